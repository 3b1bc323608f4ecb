"""Frozen parameters under ZeRO. DeepSpeed keeps no fp32 copy of them, so each rank keeps one of its range.

    fp32 ranges, one a rank ─ cast, after values were read into them ─▶ weights of the passes, on all ranks

Checkpoints are written from the ranges. Also in bf16, a frozen parameter therefore has the same bits in every
checkpoint.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.distributed.fragments import MODEL, Fragment, fragment_name
from pretrain.distributed.world import World


class FrozenParameters:
    """Fp32 ranges of the frozen parameters of a model that DeepSpeed holds.

    Args:
        parameters: all parameters by name, after DeepSpeed has placed them.
        world: the ranks.
        offloads: whether the ranges are in the host's memory.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], world: World, *, offloads: bool) -> None:
        self._world = world
        self._held: list[tuple[str, Any, Tensor]] = []
        """Name, parameter, and this rank's range, padded to the same length on all ranks."""
        for name, parameter in parameters:
            if not parameter.requires_grad:
                place = torch.device("cpu") if offloads else parameter.device
                own = torch.zeros(self._length(parameter), device=place)
                self._held.append((name, parameter, own))

    def _length(self, parameter: Any) -> int:
        if _is_sharded(parameter):
            return int(parameter.ds_tensor.ds_numel)
        return -(-parameter.numel() // self._world.size)

    def fragments(self) -> Iterator[Fragment]:
        """Yield this rank's ranges, without padding."""
        for name, parameter, own in self._held:
            shape = tuple(parameter.ds_shape if _is_sharded(parameter) else parameter.shape)
            start = self._world.rank * len(own)
            length = min(len(own), torch.Size(shape).numel() - start)
            if length > 0:
                yield Fragment(fragment_name(MODEL, name), shape, start, own[:length])

    @torch.no_grad()
    def cast(self) -> None:
        """Set the weights of the passes. All ranks call it."""
        for _, parameter, own in self._held:
            if _is_sharded(parameter):
                parameter.ds_tensor.data.copy_(own)
                continue
            numbers = self._world.gather_tensor(own.to(parameter.device, parameter.dtype)).flatten()
            parameter.copy_(numbers[: parameter.numel()].view_as(parameter))


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Return whether each rank holds a part of a parameter, as under ZeRO stage 3."""
    return hasattr(parameter, "ds_tensor")
