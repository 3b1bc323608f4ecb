"""Rank 0 of a large world, alone in this process: torch's fake process group, and tensors of shapes without values.

Collectives of a fake group return at once and move nothing. The engine's own code runs: meshes, sharding, gathers, a
step of training. `Collectives` counts what the rank asks of the other ranks.

    with fake_world(1024) as world:
        engine = fake_engine(config, world)
        with Collectives() as collectives:
            engine.train_step(...)
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from math import prod
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.tensor._sharding_prop
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

import pretrain.engines.pytorch
from byteloom.core.torch_compat import TorchDispatchMode, tree_leaves
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Rows
from pretrain.config.schema import Config
from pretrain.distributed.world import World
from pretrain.engines import Engine, build_engine
from pretrain.engines.base import BaseEngine
from pretrain.estimate.activations import on_meta

OF_CONTEXT = {"context_gather", "context_scatter", "context_halo", "ring_attention", "ring_attention_backward"}
"""Byteloom's operations that exchange tensors within a context group."""
_item = torch.ops.aten._local_scalar_dense.default


def _with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose tensors have values, though it is called where tensors are fake."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments, **options)

    return call


class FakeWorld(World):
    """World whose exchanges through the hosts have values: rank 0's own."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        is_of_hosts = name in vars(World) and callable(value) and name not in ("sum_in_place", "gather_tensor")
        return _with_values(value) if is_of_hosts else value


@contextmanager
def fake_world(size: int) -> Iterator[World]:
    """Yield the world of rank 0; tensors that are made within are fake."""
    if dist.is_initialized():
        dist.destroy_process_group()  # an engine of one rank has left its group
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        with (
            patch.object(pretrain.engines.pytorch, "init_device_mesh", _with_values(dist.init_device_mesh)),
            patch.object(BaseEngine, "_scored_targets", _with_values(BaseEngine._scored_targets)),
            # It looks for a fake mode, finds this one, and makes fake tensors of whole parameters in it. A fake mode of
            # its own hides them from FSDPMemTracker, as in real runs.
            patch.object(torch.distributed.tensor._sharding_prop, "detect_fake_mode", lambda *_: None),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield FakeWorld(0, size, 0)
    finally:
        dist.destroy_process_group()


def fake_engine(config: Config, world: World, *, micro_batches: int = 1) -> Engine:
    """Return the engine of a recipe, with a number of micro-batches a step and rank."""
    rows = config.train.micro_batch
    with unset_fake_temporarily():
        model = on_meta(config.model)
    return build_engine(
        config.engine,
        model,
        config.optimizer,
        seed=0,
        world=world,
        global_batch=micro_batches * rows * world.size // config.engine.context,
        micro_batch=rows,
    )


def micro_batches_of(config: Config, world: World, count: int = 1) -> Sequence[MicroBatch]:
    """Return rank 0's micro-batches of a step, of zero bytes."""
    shape = config.train.micro_batch, config.model.sequence_length
    rows = Rows(np.zeros(shape, np.uint8), np.empty(0, np.int64), None)
    return [MicroBatch(number * world.size, rows, np.ones(shape, bool)) for number in range(count)]


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has begun."""

    name: str
    """Operation of torch's c10d, such as allreduce_."""
    bytes: int
    """Bytes of its largest tensor: of the output of a gather, of the input of a sum."""
    is_of_numbers: bool
    """Whether it exchanges numbers of each rank, which are fp64, and no parameters or gradients."""


class Collectives(TorchDispatchMode):
    """Mode that records the collectives that begin within; a fake number that the host reads is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Collective] = []
        self.of_context: Counter[str] = Counter()
        """Number of Byteloom's operations within context groups, by name; their collectives are not among `all`."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is _item and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        if function.namespace == "byteloom" and function.overloadpacket.__name__ in OF_CONTEXT:
            self.of_context[function.overloadpacket.__name__] += 1
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            sizes = [prod(tensor.shape) * tensor.element_size() for tensor in tensors]
            is_of_numbers = all(tensor.dtype == torch.float64 for tensor in tensors)
            self.all.append(Collective(function.overloadpacket.__name__, max(sizes, default=0), is_of_numbers))
        return function(*args, **(kwargs or {}))

    def calls(self, name: str) -> int:
        """Return the number of collectives of parameters and gradients with a name."""
        return len(self._sizes(name))

    def bytes(self, name: str) -> int:
        """Return the bytes of the collectives of parameters and gradients with a name."""
        return sum(self._sizes(name))

    def _sizes(self, name: str) -> list[int]:
        return [each.bytes for each in self.all if each.name == name and not each.is_of_numbers]

    @property
    def of_numbers(self) -> list[Collective]:
        """Return the collectives of numbers."""
        return [each for each in self.all if each.is_of_numbers]
