"""Entropies of documents by a model of bytes that reads a limited length, such as those that a corpus has beside it.

    bytes of a document in order ─▶ ContextTracker ─▶ ContextPart: new bytes, and those before them ─▶ entropies_of

A context is a document, or a line of it. Windows are as long as the model reads, and overlap by R bytes:

    context     ├──────────────────────────────────────────────┤
    window 0    [SEP, new      new      new ]
    window 1                          [ R  new      new ]          a byte has all of its context, or R bytes at least
    window 2                                      [ R  new ]

R is the bytes that a byte depends on, if attention has a window. Otherwise, or if that is more, it is half a window.
A window depends on the context alone. Shards, blocks, batches and rows change only the rounding.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.corpus.blocks import Block
from data_pipeline.corpus.entropies import Entropies
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.models.entropy_model import NEWLINE, EntropyModel

IDS_AT_ONCE = 1 << 15
"""Ids of a batch of windows, unless one window has more."""

Units = NDArray[np.int16]
"""Bytes of a document as ids, in which SEPARATOR is its end."""


class ContextRule(NamedTuple):
    """Rule by which a byte has its context."""

    size: int
    """Bytes of a window."""
    overlap: int
    """R: bytes that a window has of the one before."""
    by_lines: bool
    """True: a context ends after each newline."""

    @classmethod
    def of(cls, model: EntropyModel) -> "ContextRule":
        """Return the rule of a model."""
        half = (model.longest + 1) // 2
        return cls(2 * half, half if model.reach is None else min(model.reach, half), model.resets)

    @property
    def step(self) -> int:
        """Bytes by which windows move."""
        return self.size - self.overlap


class ContextPart(NamedTuple):
    """Bytes of a document whose entropies are wanted, after what windows read before them."""

    units: Units
    """The bytes before, then the new ones."""
    first: int
    """Bytes between the start of the context of units[0] and units[0]: a multiple of the step."""
    new: int
    """Number of the bytes before."""


class ContextTracker:
    """Bytes of a document that the windows of its next bytes read, too."""

    def __init__(self, rule: ContextRule) -> None:
        """Begin a document."""
        self._rule = rule
        self._held: Units = np.empty(0, np.int16)
        self._first = 0

    def peek(self, units: Units) -> ContextPart:
        """Return the next bytes of the document with those before them."""
        return ContextPart(np.concatenate([self._held, units]), self._first, len(self._held))

    def add(self, units: Units) -> ContextPart:
        """Return the next bytes of the document with those before them, and move behind them."""
        part = self.peek(units)
        begin = -part.first
        if self._rule.by_lines and len(ends := np.flatnonzero(part.units == NEWLINE)):
            begin = int(ends[-1]) + 1
        rule, place = self._rule, len(part.units) - begin  # of the next byte in its context
        first = max((place - rule.size) // rule.step + 1, 0) * rule.step
        self._held, self._first = part.units[begin + first :], first
        return part


class _Window(NamedTuple):
    """A window of a part."""

    part: int
    """Number of the part."""
    begin: int
    """First byte that it reads, in the part."""
    new: int
    """First byte whose entropy it gives."""
    end: int
    """Byte after the last."""
    begins_context: bool
    """True: SEPARATOR comes before its first byte."""

    @property
    def length(self) -> int:
        """Ids of the window."""
        return self.end - self.begin + self.begins_context


def entropies_of(model: EntropyModel, parts: Sequence[ContextPart], device: torch.device) -> list[Entropies]:
    """Return the entropies of the new bytes of parts: of their predictions from their contexts.

    Args:
        model: the model of bytes, with contexts.
        parts: bytes of documents.
        device: of the model.

    Returns:
        An array for each part, with the (new bytes,) fp16 entropies in nats.
    """
    rule = ContextRule.of(model)
    found = [np.empty(len(part.units) - part.new, np.float16) for part in parts]
    windows = [window for number, part in enumerate(parts) for window in _windows(rule, number, part)]
    for batch in _batches(sorted(windows, key=lambda window: window.length)):
        ids = np.full((len(batch), batch[-1].length), PADDING, np.int64)
        for row, window in zip(ids, batch, strict=True):
            row[0] = SEPARATOR
            row[window.length - (window.end - window.begin) : window.length] = parts[window.part].units[
                window.begin : window.end
            ]
        entropies = model.of_ids(torch.from_numpy(ids).to(device)).half().cpu().numpy()
        for row, window in zip(entropies, batch, strict=True):
            first = parts[window.part].new
            own = row[window.length - (window.end - window.new) : window.length]
            found[window.part][window.new - first : window.end - first] = own
    return found


class BlockEntropies:
    """Entropies of the contents of a shard's blocks, given in order."""

    def __init__(self, model: EntropyModel, device: torch.device, withdrawn: Iterable[str] = ()) -> None:
        """Begin a shard.

        Args:
            model: the model of bytes.
            device: of the model.
            withdrawn: keys of documents that are not read; their entropies are 0.
        """
        self._model, self._device, self._withdrawn = model, device, set(withdrawn)
        self._tracker = ContextTracker(ContextRule.of(model))

    def __call__(self, block: Block) -> Entropies:
        """Return the entropies of the content of the next block."""
        content, parts, places = np.frombuffer(block.content, np.uint8), [], []
        for piece in block.slices:
            if piece.document_offset == 0:
                self._tracker = ContextTracker(ContextRule.of(self._model))
            if piece.key not in self._withdrawn:
                units = content[piece.start : piece.start + piece.length + piece.ends].astype(np.int16)
                if piece.ends:
                    units[-1] = SEPARATOR
                parts.append(self._tracker.add(units))
                places.append(piece.start)
        found = np.zeros(len(content), np.float16)
        for place, entropies in zip(places, entropies_of(self._model, parts, self._device), strict=True):
            found[place : place + len(entropies)] = entropies
        return found


def _windows(rule: ContextRule, number: int, part: ContextPart) -> Iterable[_Window]:
    """Yield the windows that give the entropies of the new bytes of a part."""
    ends = np.flatnonzero(part.units[:-1] == NEWLINE) + 1 if rule.by_lines else np.empty(0, np.int64)
    begin, first = 0, part.first
    for end in [*ends.tolist(), len(part.units)]:
        start = begin - first  # of the context
        for window in range(first // rule.step, max(-(-(end - start - rule.size) // rule.step) + 1, 1)):
            own = start + window * rule.step
            new, stop = max(own + rule.overlap if window else own, part.new), min(own + rule.size, end)
            if new < stop:
                yield _Window(number, own, new, stop, begins_context=not window)
        begin, first = end, 0


def _batches(windows: Sequence[_Window]) -> Iterable[list[_Window]]:
    """Yield windows, shortest first, in batches of a limited number of ids."""
    batch: list[_Window] = []
    for window in windows:
        if batch and (len(batch) + 1) * window.length > IDS_AT_ONCE:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
