"""Starts of the patches of a text. A model finds them window by window, or a rule finds them without a model.

    window of the model     ────────────────────────────  seen by stage
                                          └ scored bytes ─▶ starts and bits of the text

A patch that starts before byte i is one that starts at position i of a row: the model decides after it has read byte
i - 1, and byte i is the first that the patch helps to predict.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.documents import Piece
from data_pipeline.vocabulary import SEPARATOR
from pretrain.evaluation.evaluate import Progress, score_windows, scorer
from pretrain.evaluation.modes import Mode, check_mode, stride_of
from pretrain.evaluation.scores import EvaluationError
from pretrain.evaluation.windows import ScoredWindow, batched, padded, windows_of
from pretrain.models import ByteModel
from pretrain.models.patching.patcher import Patcher, PatchState
from pretrain.models.patching.watching import SeenPatches, recorded

CPU = torch.device("cpu")
RULE_BYTES = 1 << 20
"""Bytes that a rule reads at a time."""
MODES = (Mode.windows, Mode.sliding)
"""Modes in which patches can be found: those in which a window is one row of the model."""

Starts = dict[str, NDArray[np.bool_]]
"""By stage, for each byte whether a patch starts before it."""


@dataclass(frozen=True)
class PatchedText:
    """A text with its patches."""

    data: bytes
    starts: Starts
    bits: NDArray[np.float64] | None = None
    """Bits of each byte; None without a model."""
    windows: int = 0
    """Windows in which a model read the text; 0 without a model."""
    full_windows: dict[str, int] = field(default_factory=dict)
    """Windows with more patches than the model's capacity, by stage."""


def patches_of_rule(rule: Patcher, data: bytes, progress: Progress = lambda done: None) -> PatchedText:
    """Return a text with the patches of a rule that reads bytes alone. The text is one row, whatever its length.

    Args:
        rule: with a capacity of at least the bytes of the text.
        data: the text.
        progress: called with the bytes read.
    """
    read = np.concatenate([np.array([SEPARATOR], np.int64), np.frombuffer(data, np.uint8)[:-1]])
    found, state = [np.zeros(0, bool)], PatchState.empty(1, CPU)
    for first in range(0, len(data), RULE_BYTES):
        patches = rule(torch.from_numpy(read[None, first : first + RULE_BYTES]), state)
        state = patches.state
        found.append(patches.starts[0].numpy())
        progress(len(found[-1]))
    return PatchedText(data, {"0": np.concatenate(found)})


def patches_of_rows(
    rule: Patcher,
    data: bytes,
    length: int,
    rows: int,
    progress: Progress = lambda done: None,
    device: torch.device = CPU,
) -> PatchedText:
    """Return a text with the patches of a rule that reads rows of limited length, in sliding windows.

    Args:
        rule: with a capacity of at least the length.
        data: the text.
        length: positions of a row. It is at least 2.
        rows: windows read at once.
        progress: called with the bytes read.
        device: of the rule.
    """
    found = PatchedText(data, {"0": np.zeros(len(data), bool)})
    own = windows_of([Piece("text", "binary", 0, data, ends=True)], length, length // 2)
    for batch in batched(own, rows):
        ids = torch.from_numpy(padded(batch)).long()
        read = F.pad(ids[:, :-1], (1, 0), value=SEPARATOR)
        _take(found, batch, {"0": rule(read.to(device)).starts.cpu().numpy()})
        progress(sum(len(window.ids) - window.context for window in batch))
    return found


def patches_of_model(
    model: ByteModel,
    data: bytes,
    mode: Mode,
    rows: int,
    progress: Progress = lambda done: None,
    *,
    after_separator: bool = False,
) -> PatchedText:
    """Return a text with the patches that a model makes in it, and its bits.

    Args:
        model: the model, in evaluation mode.
        data: the text, which is one document.
        mode: bytes that each byte is predicted from; one of MODES. Sliding windows keep the patch that starts with
            each window out of the text.
        rows: windows read at once.
        progress: called with the bytes scored.
        after_separator: whether a separator precedes the text.

    Raises:
        EvaluationError: the model has no patches, or the mode is none of MODES.
    """
    if mode not in MODES:
        raise EvaluationError(f"patches cannot be found in mode {mode}; choose {' or '.join(MODES)}")
    check_mode(model, mode)
    stages_of = _stages_of(model)
    patchers = model.patchers()
    found = PatchedText(data, {stage: np.zeros(len(data), bool) for stage in patchers or ["0"]}, np.empty(len(data)))
    windows, full = 0, dict.fromkeys(patchers, 0)
    own = windows_of(
        [Piece("text", "binary", 0, data, ends=True)],
        model.sequence_length,
        stride_of(model, mode),
        after_separator=after_separator,
    )
    with recorded(patchers) as seen:
        for batch, nats in score_windows(scorer(model), own, rows):
            _take(found, batch, stages_of(seen, batch), nats)
            windows += len(batch)
            for stage, are_full in _full_rows(seen).items():
                full[stage] += int(are_full.sum())
            progress(sum(len(window.ids) - window.context for window in batch))
    return PatchedText(data, found.starts, found.bits, windows, full)


def _stages_of(model: ByteModel) -> Callable[[Mapping[str, SeenPatches], list[ScoredWindow]], Starts]:
    """Return a function from the patches of a pass over windows to (rows, T) starts by stage.

    Raises:
        EvaluationError: the model has no patches.
    """
    size = model.patch_size
    if model.patchers():
        return lambda seen, windows: by_bytes(seen)
    if size is None:
        raise EvaluationError(
            "this model has no patches: it reads every byte alike; --rule shows those of a rule instead"
        )

    def fixed(seen: Mapping[str, SeenPatches], windows: list[ScoredWindow]) -> Starts:
        length = max(len(window.ids) for window in windows)
        return {"0": np.tile(np.arange(length) % size == 0, (len(windows), 1))}

    return fixed


def by_bytes(seen: Mapping[str, SeenPatches]) -> Starts:
    """Return (rows, T) starts by stage, for each byte of the rows. A further stage has patches of patches."""
    found: Starts = {}
    mask: Tensor | None = None
    for stage, patches in seen.items():
        if mask is None:
            mask = patches.starts
        else:
            number = (mask.cumsum(1) - 1).clamp(0, patches.starts.shape[1] - 1)
            mask = mask & patches.starts.gather(1, number)
        found[stage] = mask.cpu().numpy()
    return found


def _full_rows(seen: Mapping[str, SeenPatches]) -> dict[str, Tensor]:
    """Return (rows,) booleans by stage: whether a row has more patches than the capacity."""
    full: dict[str, Tensor] = {}
    counts: Tensor | None = None
    for stage, patches in seen.items():
        refused = patches.wanted & ~patches.starts
        if counts is not None:  # further places of a stage hold nothing
            refused &= torch.arange(refused.shape[1], device=refused.device) < counts
        full[stage], counts = refused.any(1), patches.starts.sum(1, keepdim=True)
    return full


def _take(found: PatchedText, windows: list[ScoredWindow], starts: Starts, nats: Tensor | None = None) -> None:
    """Put the starts and bits of the scored bytes of windows at their places in the text."""
    for row, window in enumerate(windows):
        own = slice(window.context, len(window.ids))
        place = slice(window.offset + window.context, window.offset + len(window.ids))
        for stage, mask in starts.items():
            found.starts[stage][place] = mask[row, own]
        if found.bits is not None and nats is not None:
            found.bits[place] = nats[row, own].double().numpy() / math.log(2)
