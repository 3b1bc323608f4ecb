"""Bytes of weights, gradients, masters and moments on each GPU, counted by parameter.

Bytes of each for one parameter, on each of N GPUs, in bf16:

                     weights   gradients   masters   moments
    ddp                 2          4          4         8
    zero-1              2          4         4/N       8/N
    zero-2              2         4/N        4/N       8/N
    zero-3, FSDP2      2/N        4/N        4/N       8/N     and what is gathered at a time
    hsdp            as zero-3, N the GPUs of one node

In fp32 the weights of ZeRO have 4 bytes; one process and DDP compute with the masters themselves. The rows follow from
what engines declare (`StateSharding`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from pretrain.engines import ENGINES, EngineConfig, StateSharding
from pretrain.models import ByteModel

USABLE = 0.9
"""Share of a GPU's memory that may be filled. The rest is for what estimates leave out: the CUDA context, workspaces of
kernels, communication buffers, and memory that the allocator cannot use. CUDA also has no fused attention kernel for
65,536 patches or more in a micro-batch (`attention.LARGEST_FUSED_BATCH`)."""
NODE = 8
"""GPUs of a node, within which HSDP shards."""
GRADIENT, MASTER, MOMENTS = 4, 4, 8
"""Bytes per parameter, in any precision."""


class States(NamedTuple):
    """Bytes on each GPU that do not depend on the micro-batch."""

    weights: int
    """Copies in the precision of the passes, and those that are gathered for a time."""
    gradients: int
    masters: int
    moments: int


@dataclass(frozen=True)
class ShardedStates:
    """States on each GPU under one sharding."""

    name: str
    """Name of the row that shows them."""
    states: States

    @property
    def bytes(self) -> int:
        """Return the bytes of all states."""
        return sum(self.states)


def shardings(model: ByteModel, dtype: torch.dtype, gpus: int) -> list[ShardedStates]:
    """Return the states on each GPU under every sharding of the registered engines.

    Args:
        model: of any precision.
        dtype: type of parameters in the passes.
        gpus: number of GPUs.
    """
    if gpus == 1:
        return [ShardedStates("one process", _states(model, dtype))]
    distinct = {entry.sharding.label: entry.sharding for entry in ENGINES.entries().values()}
    rows = []
    for sharding in sorted(distinct.values(), key=_order):
        if not sharding.within_groups:
            rows.append(ShardedStates(sharding.label, _states(model, dtype, sharding, gpus)))
        elif gpus > NODE and gpus % NODE == 0:
            label = f"{sharding.label}, {gpus // NODE} x {NODE}"
            rows.append(ShardedStates(label, _states(model, dtype, sharding, NODE)))
    return rows


def states_on_rank(engine: EngineConfig, model: ByteModel, dtype: torch.dtype, ranks: int) -> States:
    """Return the states on each rank of a run.

    Args:
        engine: of the run.
        model: of any precision.
        dtype: type of parameters in the passes.
        ranks: number of ranks.
    """
    sharding = engine.entry.sharding
    holders = engine.shards or ranks if sharding.within_groups else ranks
    return _states(model, dtype) if holders == 1 else _states(model, dtype, sharding, holders)


def _states(model: ByteModel, dtype: torch.dtype, sharding: StateSharding | None = None, holders: int = 1) -> States:
    """Return the states on each of some GPUs that share a model; without a sharding, in one process."""
    parameters, width = model.parameter_count(), dtype.itemsize
    sharding = sharding or StateSharding("one process")
    copy = width if sharding.copies_weights or dtype != torch.float32 else 0
    gathered = width * _gathered_parameters(model) if sharding.weights else 0

    def share(is_sharded: bool) -> float:
        return 1 / holders if is_sharded else 1

    return States(
        round(parameters * (copy * share(sharding.weights))) + gathered,
        round(parameters * GRADIENT * share(sharding.gradients)),
        round(parameters * MASTER * share(sharding.optimizer)),
        round(parameters * MOMENTS * share(sharding.optimizer)),
    )


def _order(sharding: StateSharding) -> tuple[bool, ...]:
    """Return the sort key that lists shardings from the least sharded to the most, groups last."""
    return sharding.within_groups, sharding.weights, sharding.gradients, sharding.optimizer


def _gathered_parameters(model: ByteModel) -> int:
    """Return the number of parameters that a fully sharded model holds whole at a time.

    These are all parameters outside the blocks, those of the current block and of the block that is fetched next, and
    the gradient of the current block before each rank takes its share.
    """
    blocks = sorted((sum(p.numel() for p in block.parameters()) for block in model.units()), reverse=True)
    return model.parameter_count() - sum(blocks) + sum(blocks[:2]) + sum(blocks[:1])
