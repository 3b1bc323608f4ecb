"""Bytes of weights, gradients, masters and moments on each GPU, counted by parameter.

Bytes of each for one parameter, on each of N GPUs, in bf16:

                     weights   gradients   masters   moments
    ddp                 2          4          4         8
    zero-1              2          4         4/N       8/N
    zero-2              2         4/N        4/N       8/N
    zero-3             2/N        4/N        4/N       8/N
    fsdp                0         4/N        4/N       8/N
    hsdp            as fsdp, N the GPUs of one node

With several passes a step, fsdp and hsdp hold whole gradients until the last one. In fp32 the weights of ZeRO have 4
bytes; one process and DDP compute with the masters themselves. Muon keeps 4 bytes of moments for a parameter of a
matrix within blocks. Frozen parameters have weights and masters, and neither gradients nor moments. A small model whose
entropies make the patches has 4 bytes for each of its own parameters, on every GPU and in any precision. The rows
follow from what engines declare (`StateSharding`), and the moments from what optimizers declare (`OptimizerEntry`).
Blocks that zero-3, fsdp and hsdp gather for a time count with the activations (`activations.GatheredBlocks`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from pretrain.engines import ENGINES, EngineConfig, StateSharding
from pretrain.models import ByteModel
from pretrain.optim import OptimizerEntry

USABLE = 0.9
"""Share of a GPU's memory that may be filled. The rest is for what estimates leave out: the CUDA context, workspaces of
kernels, communication buffers, and memory that the allocator cannot use."""
NODE = 8
"""GPUs of a node, within which HSDP shards."""
GRADIENT, MASTER, MOMENT = 4, 4, 4
"""Bytes of a number, in any precision."""


class States(NamedTuple):
    """Bytes on each GPU that do not depend on the micro-batch."""

    weights: int
    """Copies in the precision of the passes, and the fp32 weights of a model that makes the patches."""
    gradients: int
    masters: int
    moments: int


@dataclass(frozen=True)
class ShardedStates:
    """States on each GPU under one sharding."""

    name: str
    """Name of the row in the table."""
    states: States
    gathers: bool
    """Ranks gather each block before they use it."""

    @property
    def bytes(self) -> int:
        """Return the bytes of all states."""
        return sum(self.states)


def shardings(
    model: ByteModel, optimizer: OptimizerEntry, dtype: torch.dtype, gpus: int, passes: int = 1
) -> list[ShardedStates]:
    """Return the states on each GPU under every sharding of the registered engines that support an optimizer.

    Args:
        model: of any precision.
        optimizer: what the optimizer declares.
        dtype: type of parameters in the passes.
        gpus: number of GPUs.
        passes: micro-batches of a step on each GPU.
    """
    moments = MOMENT * optimizer.count_moments(model)
    if gpus == 1:
        return [ShardedStates("one process", _states(model, moments, dtype), gathers=False)]
    supporting = [entry.sharding for entry in ENGINES.entries().values() if entry.supports(optimizer)]
    distinct = {sharding.label: sharding for sharding in supporting}
    rows = []
    for sharding in sorted(distinct.values(), key=_order):
        if not sharding.within_groups:
            label, holders = sharding.label, gpus
        elif gpus > NODE and gpus % NODE == 0:
            label, holders = f"{sharding.label}, {gpus // NODE} x {NODE}", NODE
        else:
            continue
        rows.append(ShardedStates(label, _states(model, moments, dtype, sharding, holders, passes), sharding.weights))
    return rows


def states_on_rank(
    engine: EngineConfig, optimizer: OptimizerEntry, model: ByteModel, dtype: torch.dtype, ranks: int, passes: int = 1
) -> States:
    """Return the states on each rank of a run.

    Args:
        engine: of the run.
        optimizer: what the run's optimizer declares.
        model: of any precision.
        dtype: type of parameters in the passes.
        ranks: number of ranks.
        passes: micro-batches of a step on each rank.
    """
    sharding = engine.entry.sharding
    holders = engine.shards or ranks if sharding.within_groups else ranks
    moments = MOMENT * optimizer.count_moments(model)
    if holders == 1:
        return _states(model, moments, dtype)
    return _states(model, moments, dtype, sharding, holders, passes)


def _states(
    model: ByteModel,
    moments: int,
    dtype: torch.dtype,
    sharding: StateSharding | None = None,
    holders: int = 1,
    passes: int = 1,
) -> States:
    """Return the states on each of some GPUs that share a model; without a sharding, in one process."""
    parameters, width = model.parameter_count(), dtype.itemsize
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    sharding = sharding or StateSharding("one process")
    casts_masters = dtype != torch.float32 and not sharding.weights
    copy = width if sharding.copies_weights or casts_masters else 0
    frozen = sum(patcher.frozen_bytes() for patcher in model.patchers().values())

    def share(is_sharded: bool) -> float:
        return 1 / holders if is_sharded else 1

    return States(
        round(parameters * copy * share(sharding.weights)) + frozen,
        round(trained * GRADIENT * share(sharding.gradients and not (sharding.sums_in_last_pass and passes > 1))),
        round(parameters * MASTER * share(sharding.optimizer)),
        round(moments * share(sharding.optimizer)),
    )


def _order(sharding: StateSharding) -> tuple[bool, ...]:
    """Return the sort key that lists shardings from the least sharded to the most, groups last."""
    is_sharded = sharding.within_groups, sharding.weights, sharding.gradients, sharding.optimizer
    return *is_sharded, not sharding.copies_weights
