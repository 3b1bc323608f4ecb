"""Patches that a forward pass makes, as others see them: recorded by stage, and counted for metrics.

    model.patchers()   {"0": rule over bytes, "1": rule over the patches of "0", …}
         │
         ├─ recorded ────▶ patches of the pass by stage      byteloom patches
         └─ PatchCounts ─▶ sums over passes ─▶ numbers       metrics of a step

A family implements `ByteModel.patchers` and `ByteModel.useful_flops`, and has both. Its forward pass calls each rule
once, as a module, and hooks on the rules see the results. A pass that nobody watches does nothing for this.

Ranks and passes add sums. Shares and means are computed from the totals.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING
from pretrain.models.patching.patcher import Patcher, Patches
from pretrain.models.patching.ratio import ratio_loss


class SeenPatches(NamedTuple):
    """Patches of a stage in a forward pass, without gradient."""

    starts: Tensor
    """(rows, n) booleans; see `Patches`."""
    wanted: Tensor
    """(rows, n) booleans."""
    probabilities: Tensor | None
    """(rows, n), of a rule that learns them."""


@contextmanager
def recorded(patchers: Mapping[str, Patcher]) -> Iterator[dict[str, SeenPatches]]:
    """Record the patches of the last forward pass within, by stage.

    Args:
        patchers: of a model; see `ByteModel.patchers`.
    """
    found: dict[str, SeenPatches] = {}

    def keep(stage: str, module: nn.Module, arguments: object, patches: Patches) -> None:
        probabilities = None if patches.probabilities is None else patches.probabilities.detach()
        found[stage] = SeenPatches(patches.starts, patches.wanted, probabilities)

    handles = [patcher.register_forward_hook(partial(keep, stage)) for stage, patcher in patchers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Sum(IntEnum):
    """Sums of a stage, by their places in a vector."""

    BYTES = 0
    """Positions of rows that predict a byte or a separator."""
    POSITIONS = 1
    """Positions of the stage: those of rows, or the patches of the stage before."""
    PATCHES = 2
    WANTED = 3
    """Patches that there would be without a capacity."""
    SLOTS = 4
    """Patches that the rows may have."""
    ROWS = 5
    FULL_ROWS = 6
    """Rows with more patches than their capacity."""
    SCORED = 7
    """Positions of rows that count in the loss."""
    SCORED_LATE = 8
    """Those from the first patch on that the capacity refused."""
    PROBABILITY = 9
    """Probability of a start, of a rule that learns it."""
    CONFIDENCE = 10
    """Distance of the probability from 1/2."""
    RATIO_LOSS = 11
    """Ratio loss of each row, times its positions that count in the loss."""


class PatchCounts:
    """Sums over the patches of forward passes, on the device.

    Args:
        patchers: of the model; at least one.
        device: of the passes.
    """

    def __init__(self, patchers: Mapping[str, Patcher], device: torch.device) -> None:
        self._patchers = patchers
        self._sums = torch.zeros(len(patchers), len(Sum), dtype=torch.float64, device=device)
        self._seen: Mapping[str, SeenPatches] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the patches of the passes within."""
        with recorded(self._patchers) as self._seen:
            yield

    @torch.no_grad()
    def add(self, ids: Tensor, targets: Tensor) -> None:
        """Add the last pass. The host does not wait for the device.

        Args:
            ids: (rows, T) that it predicted.
            targets: (rows, T) positions that count in the loss.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        is_present, place = ids != PADDING, positions.expand(ids.shape)
        of_rows = {Sum.BYTES: is_present.sum(), Sum.SCORED: targets.sum()}
        for number, (stage, patcher) in enumerate(self._patchers.items()):
            seen = self._seen[stage]
            width = seen.starts.shape[1]
            starts, wanted = seen.starts & is_present[:, :width], seen.wanted & is_present[:, :width]
            refused = wanted & ~starts
            is_full = refused.any(1)
            first_refused = refused.int().argmax(1).masked_fill(~is_full, width)
            sums = of_rows | {
                Sum.POSITIONS: is_present.sum(),
                Sum.PATCHES: starts.sum(),
                Sum.WANTED: wanted.sum(),
                Sum.FULL_ROWS: is_full.sum(),
                Sum.SCORED_LATE: (targets & (place >= first_refused[:, None])).sum(),
            }
            if seen.probabilities is not None:
                sums |= _router_sums(
                    seen.probabilities, wanted, is_present[:, :width], targets.sum(1), patcher.target_ratio
                )
            own, nothing = self._sums[number], self._sums.new_zeros(())
            own.add_(torch.stack([sums.get(each, nothing).double() for each in Sum]))
            own[Sum.SLOTS] += len(ids) * min(patcher.capacity, width)
            own[Sum.ROWS] += len(ids)
            # The patches are the positions of the next stage.
            place = (starts.cumsum(1).gather(1, place) - 1).clamp(min=0)
            is_present = positions < starts.sum(1, keepdim=True)

    def sums(self) -> Tensor:
        """Return the sums of this rank, in fp64 on the device: those of `Sum` for each stage."""
        return self._sums.flatten()

    def numbers(self, by_rank: Sequence[Sequence[float]]) -> dict[str, float]:
        """Return the metrics of the passes of all ranks, by name.

        Args:
            by_rank: sums of each rank.
        """
        totals = [math.fsum(of_ranks) for of_ranks in zip(*by_rank, strict=True)]
        numbers: dict[str, float] = {}
        for number, (stage, patcher) in enumerate(self._patchers.items()):
            sums = totals[number * len(Sum) : (number + 1) * len(Sum)]
            of_stage = _numbers(sums, is_inner=number > 0, has_target=patcher.target_ratio is not None)
            numbers |= {f"patches/{stage}/{name}": value for name, value in of_stage.items()}
        return numbers


def _router_sums(
    probabilities: Tensor, wanted: Tensor, is_present: Tensor, scored: Tensor, target: float | None
) -> dict[Sum, Tensor]:
    """Return the sums of a stage that learns where patches start.

    Args:
        probabilities: (rows, n) of a start.
        wanted: (rows, n) patches without a capacity.
        is_present: (rows, n) positions that count.
        scored: (rows,) positions that count in the loss.
        target: positions of a patch that the ratio loss aims at; None without one.
    """
    p = probabilities.double()
    sums = {
        Sum.PROBABILITY: (p * is_present).sum(),
        Sum.CONFIDENCE: ((p - 0.5).abs() * is_present).sum(),
    }
    if target is not None:
        counts = is_present.sum(1).clamp(min=1)
        losses = ratio_loss(wanted.sum(1) / counts, (p * is_present).sum(1) / counts, target)
        sums[Sum.RATIO_LOSS] = (losses * scored).sum()
    return sums


def _numbers(sums: Sequence[float], *, is_inner: bool, has_target: bool) -> dict[str, float]:
    """Return the metrics of a stage, given its sums.

    Args:
        sums: those of `Sum`.
        is_inner: whether its positions are patches of another stage.
        has_target: whether it has a ratio loss.
    """
    of = dict(zip(Sum, sums, strict=True))
    positions, patches, scored = (max(of[each], 1) for each in (Sum.POSITIONS, Sum.PATCHES, Sum.SCORED))
    numbers = {
        "bytes_per_patch": of[Sum.BYTES] / patches,
        "capacity_used": of[Sum.PATCHES] / max(of[Sum.SLOTS], 1),
        "overflow_rows": of[Sum.FULL_ROWS] / max(of[Sum.ROWS], 1),
        "overflow_bytes": of[Sum.SCORED_LATE] / scored,
    }
    if is_inner:
        numbers["positions_per_patch"] = of[Sum.POSITIONS] / patches
    if of[Sum.PROBABILITY]:  # a row's first position always has some
        numbers["router_starts"] = of[Sum.WANTED] / positions
        numbers["router_probability"] = of[Sum.PROBABILITY] / positions
        numbers["router_confidence"] = of[Sum.CONFIDENCE] / positions
        if has_target:
            numbers["ratio_loss"] = of[Sum.RATIO_LOSS] / scored
    return numbers
