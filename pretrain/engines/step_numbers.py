"""Numbers of a step that the ranks exchange: one vector a rank, gathered by one collective on the device.

    device ─▶ sums of a measurement, if the step has one (diagnosis.py); sums over patches, if the model has them
              nats, gradient norm, whether the update is done, nats of each source
    host ───▶ times, memory, target bytes, target bytes of each source
              target bytes and votes of the next step, if the loop looks ahead

Times are one step late on CUDA; see `StepTimes`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.engines.engine import StepResult
from pretrain.engines.phases import DeviceMemory, PhaseTimes, RankStep
from pretrain.engines.source_losses import SourceLosses, summed


def numbers_of_device(
    measured: Sequence[Tensor], nats: Tensor, norm: Tensor, is_fit: Tensor, by_source: SourceLosses
) -> Tensor:
    """Return the first part of a rank's vector, in fp64, given sums that are measured and scalars on the device."""
    return torch.cat([*measured, torch.stack([nats, norm.double(), is_fit.double()]), by_source.nats])


def numbers_of_host(
    times: PhaseTimes, memory: DeviceMemory, target_bytes: int, by_source: SourceLosses, upcoming: Sequence[float]
) -> list[float]:
    """Return the second part of a rank's vector."""
    return [*times, *memory, target_bytes, *by_source.bytes.tolist(), *upcoming]


def result_of(by_rank: Sequence[Sequence[float]], rank: int, sharing: int, upcoming: int) -> StepResult:
    """Return the result of a step.

    Args:
        by_rank: vector of each rank, without the sums that are measured.
        rank: this rank, whose norm and decision are the result's.
        sharing: ranks that share each row; each counts all of its bytes.
        upcoming: numbers of the next step at the end of each vector.
    """
    first, times, memory = 3, len(PhaseTimes._fields), len(DeviceMemory._fields)
    end = len(by_rank[0]) - upcoming
    sources = (end - first - times - memory - 1) // 2
    of_host = first + sources
    ranks, of_sources, target_bytes = [], [], 0
    for numbers in by_rank:
        measured = numbers[of_host : of_host + times + memory]
        ranks.append(RankStep(numbers[0], *measured))
        target_bytes += int(numbers[of_host + times + memory])
        of_sources.append([*numbers[first:of_host], *numbers[of_host + times + memory + 1 : end]])
    return StepResult(
        nats=math.fsum(each.nats for each in ranks),
        target_bytes=target_bytes // sharing,
        gradient_norm=by_rank[rank][1],
        ranks=ranks,
        by_source=summed(of_sources, sharing),
        is_updated=bool(by_rank[rank][2]),
        upcoming=[list(numbers[end:]) for numbers in by_rank],
    )
