"""Bits per byte of a model on every byte of a corpus.

Windowing: a window of at most the model's sequence length moves along each document, by `stride` bytes at a time, and
the new bytes at its end are scored, so each byte is scored once:

    document    ────────────────────────────────────────────────────────
    windows     [new]
                [    |new]
                [         |new]             until it is full, then
                     [         |new]        ...

With a stride of the sequence length, windows lie side by side and each is scored without context from before it. A
model that scores only the last N bytes of a window (Perceiver AR) takes a stride of N at most. Separators are not
read. What a byte is predicted from is the mode (`Mode`) and the stride, which results name: figures of different ones
do not compare. The figure is the sum of nats over the sum of bytes, in whole units (scores.py), so it does not depend
on how windows are batched.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from byteloom.core.locations import LocationText
from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import PADDING
from pretrain.evaluation.scores import Curve, Score, in_units
from pretrain.models import ByteModel
from pretrain.models.base import Memory
from pretrain.models.families.megabyte import Megabyte
from pretrain.models.families.transformer_xl import TransformerXL

SAMPLE_BYTES = ("low byte", "high byte")
"""Of a sample of sound, in their order."""
BLOCKS_AHEAD = 7
"""Of a corpus at a URL: blocks that one request brings, beside the one that is read."""


class ValidationConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What is measured during a run beside the training loss."""

    shards: LocationText | None = None
    """Corpus (folder or URL) that training does not read; every byte of it is scored each time. None: no validation."""
    every: int = Field(default=500, ge=1)
    """Steps between validations; there is one before the first step and one after the last as well."""


class EvaluationError(Exception):
    """A model cannot be evaluated as asked."""


class Mode(StrEnum):
    """What a byte is predicted from."""

    windows = "windows"
    """Its window alone, moved by as many bytes as the model scores at its end: T, or a Perceiver AR's N."""
    sliding = "sliding"
    """As windows, moved by T/2 at most (Press et al. 2020): at least T/2 bytes of context, at twice the cost."""
    strided = "strided"
    """As windows, with MEGABYTE's strided inference (section 2.3.3; see `strided`), at twice the cost."""
    sliding_strided = "sliding-strided"
    """Both, at four times the cost."""
    memory = "memory"
    """Its window and the memory of those before: Transformer-XL's way. One pass over every byte."""

    @property
    def slides(self) -> bool:
        return self in (Mode.sliding, Mode.sliding_strided)

    @property
    def is_strided(self) -> bool:
        return self in (Mode.strided, Mode.sliding_strided)


@dataclass
class Evaluation:
    """Every byte's price, summed in several ways. All add up to the same total."""

    groups: dict[str, Score] = field(default_factory=dict)
    positions: Curve = field(default_factory=Curve)
    """By position in the window: how many bytes before it the window holds."""
    sample_bytes: dict[str, Score] = field(default_factory=dict)
    """Of sound alone, which is 16-bit little-endian PCM: by SAMPLE_BYTES."""

    @property
    def total(self) -> Score:
        total = Score()
        for score in self.groups.values():
            total.add(score)
        return total

    def add(self, windows: "list[Window]", nats: Tensor, group_of: "GroupOf") -> int:
        """Adds the (rows, T) nats of some windows; returns the bytes that these scored.

        Raises:
            EvaluationError: one of them is no price.
        """
        added = 0
        for window, row in zip(windows, nats.numpy(), strict=True):
            try:
                prices = in_units(row[window.context : len(window.ids)])
            except ValueError as error:
                raise EvaluationError(f"the model's loss in {window.key} is not a usable number: {error}") from error
            score = Score(int(prices.sum()), len(prices), int(window.begins_document))
            self.groups.setdefault(group_of(window.key), Score()).add(score)
            self.positions.add(window.context, prices)
            if window.modality == "audio":
                for place, name in enumerate(SAMPLE_BYTES):
                    own = prices[(place - window.offset - window.context) % len(SAMPLE_BYTES) :: len(SAMPLE_BYTES)]
                    self.sample_bytes.setdefault(name, Score()).add(Score(int(own.sum()), len(own)))
            added += len(prices)
        return added


@dataclass(frozen=True)
class Window:
    key: str
    """Of its document."""
    modality: str
    ids: Ids
    offset: int
    """Of the first of them in the document."""
    context: int
    """How many of them are read only: windows before this one have scored them."""

    @property
    def begins_document(self) -> bool:
        """Whether the document's first byte is scored here."""
        return self.offset + self.context == 0


GroupOf = Callable[[str], str]
"""A document's key to the group it belongs to."""
Progress = Callable[[int], None]
"""Called with the number of bytes scored since the last call."""


def evaluate_model(
    model: ByteModel,
    corpus: Corpus,
    mode: Mode,
    rows: int,
    group_of: GroupOf = lambda key: "all",
    progress: Progress = lambda done: None,
    stride: int | None = None,
) -> Evaluation:
    """Scores every byte of a corpus once, in a mode.

    Args:
        rows: windows scored at once.
        stride: bytes scored at the end of a window, in the place of `stride_of` the mode.
    Raises:
        EvaluationError: the mode or the stride is not for this model.
    """
    length, most = model.sequence_length, stride_of(model)
    if stride is not None and stride > most:
        raise EvaluationError(f"--stride is {stride}; this model scores at most {count(most, 'byte')} of a window")
    if mode is Mode.memory:
        if not isinstance(model, TransformerXL) or not model.memory_length:
            raise EvaluationError(f"mode {mode} is for a Transformer-XL with model.memory_length; this has none")
        if stride not in (None, length):
            raise EvaluationError(f"--stride is {stride}; mode {mode} takes no stride: windows follow each other")
        return evaluate_with_memory(model, corpus, rows, group_of, progress)
    nats_of = scorer(model)
    if mode.is_strided:
        if not isinstance(model, Megabyte):
            raise EvaluationError(f"mode {mode} is for MEGABYTE; this model has no patches")
        nats_of = strided(nats_of, model.patch_size)
    return evaluate(nats_of, corpus, length, rows, group_of, progress, stride or stride_of(model, mode))


def stride_of(model: ByteModel, mode: Mode = Mode.windows) -> int:
    """Bytes that a mode scores at the end of a full window: all that the model scores there, or half a window at most.

    That of `windows` is the largest stride at which the model scores every byte.
    """
    scored = len(range(model.sequence_length)[model.scored(model.sequence_length)])
    return min(scored, -(-model.sequence_length // 2)) if mode.slides else scored


def evaluate(
    nats_of: Callable[[Ids], Tensor],
    corpus: Corpus,
    sequence_length: int,
    rows: int,
    group_of: GroupOf = lambda key: "all",
    progress: Progress = lambda done: None,
    stride: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Evaluation:
    """Scores every byte of a corpus once, or this rank's part of them.

    Args:
        nats_of: (rows, T) int16 ids, padded at the end of rows, to (rows, T) fp32 nats on the CPU.
        rows: windows scored at once.
        stride: bytes scored at the end of a window; all of it if None. `stride_of` gives a model's own.
        rank, world_size: who calls this, of how many. All call `nats_of` equally often, as sharded models need it.
    """
    evaluation = Evaluation()
    batches = _batched(document_windows(corpus, sequence_length, stride), rows)
    while batch := list(islice(batches, world_size)):
        if rank < len(batch):
            windows = batch[rank]
            progress(evaluation.add(windows, nats_of(_side_by_side(windows)), group_of))
        else:
            nats_of(_side_by_side(batch[0]))  # another rank's
    return evaluation


def evaluate_with_memory(
    model: TransformerXL,
    corpus: Corpus,
    rows: int,
    group_of: GroupOf = lambda key: "all",
    progress: Progress = lambda done: None,
) -> Evaluation:
    """Scores every byte of a corpus once, each document's segments in order with the memory of those before.

    As many documents as `rows` are held in memory and go side by side; a row ends with its document.
    """
    evaluation = Evaluation()
    device, length = next(model.parameters()).device, model.sequence_length
    for documents in _batched(document_windows(corpus, corpus.raw_bytes), rows):
        documents.sort(key=lambda document: -len(document.ids))
        memory: Memory = {}
        for start in range(0, len(documents[0].ids), length):
            segments = [
                Window(document.key, document.modality, document.ids[start : start + length], start, context=0)
                for document in documents
                if len(document.ids) > start
            ]
            ids = torch.from_numpy(_side_by_side(segments)).to(device)
            with torch.no_grad():
                memory = {name: tensor[: len(segments)] for name, tensor in memory.items()}
                nats, memory = model.forward_segment(ids, memory)
            progress(evaluation.add(segments, nats.cpu(), group_of))
    return evaluation


def strided(nats_of: Callable[[Ids], Tensor], patch_size: int) -> Callable[[Ids], Tensor]:
    """MEGABYTE's strided inference (section 2.3.3): a second pass over the window less its first P/2 bytes.

    Each pass keeps the first halves of its patches, where predictions are best. The paper leaves the border open. Here
    the window's first patch keeps the base pass's second half as well, which the shifted pass would predict from
    nothing; the second halves of all later patches come from the shifted pass.

    Raises:
        EvaluationError: the patch size is odd.
    """
    if patch_size % 2:
        raise EvaluationError(f"strided inference needs an even model.patch_size, and this model's is {patch_size}")
    half = patch_size // 2

    def nats_of_two_passes(ids: Ids) -> Tensor:
        nats = nats_of(ids)
        positions = torch.arange(ids.shape[1])
        second_halves = positions[(positions >= patch_size) & (positions % patch_size >= half)]
        if len(second_halves):
            nats[:, second_halves] = nats_of(ids[:, half:])[:, second_halves - half]
        return nats

    return nats_of_two_passes


def scorer(model: ByteModel) -> Callable[[Ids], Tensor]:
    """A model's forward pass in the form `evaluate` asks for."""
    device = next(model.parameters()).device

    def nats_of(ids: Ids) -> Tensor:
        with torch.no_grad():
            return model(torch.from_numpy(ids).to(device)).cpu()

    return nats_of


def document_windows(corpus: Corpus, length: int, stride: int | None = None) -> Iterator[Window]:
    """Each document's windows of at most `length` bytes, in order; the last one scores as few as are left.

    Withdrawn documents are left out.
    """
    stride = stride or length
    withdrawn = {entry.key for entry in corpus.withdrawn}
    data, scored = b"", 0  # of the document under way: bytes held, and how many of them are scored
    for number in range(len(corpus)):
        block = corpus.read(number, through=number + BLOCKS_AHEAD)
        for part in block.slices:
            if part.key in withdrawn:
                continue
            offset = part.document_offset - len(data)
            data += block.content[part.start : part.start + part.length]
            while len(data) - scored >= (1 if part.ends else stride):
                begin, end = max(0, scored + stride - length), min(scored + stride, len(data))
                ids = np.frombuffer(data[begin:end], np.uint8).astype(np.int16)
                yield Window(part.key, part.modality, ids, offset + begin, scored - begin)
                scored = end
            if part.ends:
                data, scored = b"", 0
            else:
                begin = max(0, scored + stride - length)
                data, scored = data[begin:], scored - begin


def _side_by_side(windows: list[Window]) -> Ids:
    """(rows, T) ids of the longest window's length, padded at the end of rows."""
    ids = np.full((len(windows), max(len(window.ids) for window in windows)), PADDING, np.int16)
    for row, window in zip(ids, windows, strict=True):
        row[: len(window.ids)] = window.ids
    return ids


def _batched(windows: Iterable[Window], rows: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in windows:
        batch.append(window)
        if len(batch) == rows:
            yield batch
            batch = []
    if batch:
        yield batch
