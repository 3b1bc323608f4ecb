"""What a training step holds in a GPU's memory, told without a GPU.

Activations are measured: the model's own forward and backward pass run on the meta device, where tensors have shapes
and no data, and every tensor that lives is counted. So no formula of a model can be wrong here. Attention is as a GPU's
fused kernels have it: they keep queries, keys, values, output and one fp32 number a query and head, but no scores.

States are counted by parameter. Bytes of each, on each of N GPUs, in bf16:

                     weights   gradients   masters   moments
    ddp                 2          4          4         8
    zero-1              2          4         4/N       8/N
    zero-2              2         4/N        4/N       8/N
    zero-3, FSDP2      2/N        4/N        4/N       8/N     and what is gathered at a time
    hsdp            as zero-3, N the GPUs of one node

In fp32 the weights of ZeRO have 4 bytes; one process and DDP compute with the masters themselves.

Left out: the CUDA context, workspaces of kernels, buffers of communication, what the allocator cannot use, and that
CUDA has no fused kernel for 65,536 patches or more in a micro-batch (`attention.LARGEST_FUSED_BATCH`). `USABLE` is for
them.
"""

import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from byteloom.core.torch_compat import TorchDispatchMode, flash_attention, tree_leaves
from pretrain.engines import CheckpointingConfig
from pretrain.engines.blocks import recompute
from pretrain.models import ByteModel, ModelConfig, build_model
from pretrain.models.blocks.nats import CHUNK
from pretrain.models.blocks.unit import Unit

USABLE = 0.9
"""Share of a GPU's memory that may be filled; the rest is for what is left out."""
NODE = 8
"""GPUs of a node, within which HSDP shards."""
MANY_ROWS = 64
"""Activations are measured up to so many rows, or what fills two chunks of the loss. Lines between are right to some
hundredths."""
MOST_ROWS = 1 << 40
"""More than any memory holds: where the search for the largest micro-batch ends."""
KEEP_ALL = CheckpointingConfig()
GRADIENT, MASTER, MOMENTS = 4, 4, 8
"""Bytes a parameter, in any precision."""


class States(NamedTuple):
    """Bytes on each GPU that do not depend on the micro-batch."""

    weights: int
    """Copies in the precision of the passes, and those that are gathered for a time."""
    gradients: int
    masters: int
    moments: int


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward and backward pass, beside parameters and their gradients."""

    kept: int
    """When the forward pass is done: what the backward pass needs."""
    peak: int
    """At most, on the way there and back: with logits, passing gradients and what is computed again."""


@dataclass(frozen=True)
class Line:
    """Peak bytes of activations as a function of the rows of a micro-batch: straight between measurements, and on."""

    measured: tuple[tuple[int, int], ...]
    """(rows, bytes), two or more, rising."""

    def at(self, rows: int) -> int:
        ahead = min(max(bisect_left(self.measured, (rows,)), 1), len(self.measured) - 1)
        (few, low), (many, high) = self.measured[ahead - 1 : ahead + 1]
        return round(low + (high - low) * (rows - few) / (many - few))

    def rows_within(self, size: float) -> int:
        """The most rows that need no more than `size` bytes; 0: not even one."""
        return bisect_right(range(1, MOST_ROWS), size, key=self.at)


@dataclass(frozen=True)
class Sharding:
    name: str
    states: States

    @property
    def bytes(self) -> int:
        return sum(self.states)


def shardings(model: ByteModel, dtype: torch.dtype, gpus: int) -> list[Sharding]:
    """The states on each of some GPUs under every sharding there is for them.

    Args:
        dtype: of the passes; the model's own does not matter.
    """
    parameters, width = model.parameter_count(), dtype.itemsize
    copy = 0 if dtype == torch.float32 else width
    gathered = width * _gathered_parameters(model)

    def states(weights: float, gradients: float, optimizer: float, more: int = 0) -> States:
        return States(
            round(parameters * weights) + more,
            round(parameters * GRADIENT * gradients),
            round(parameters * MASTER * optimizer),
            round(parameters * MOMENTS * optimizer),
        )

    if gpus == 1:
        return [Sharding("one process", states(copy, 1, 1))]
    share = 1 / gpus
    found = [
        Sharding("ddp", states(copy, 1, 1)),
        Sharding("zero-1", states(width, 1, share)),
        Sharding("zero-2", states(width, share, share)),
        Sharding("zero-3, fsdp2", states(width * share, share, share, gathered)),
    ]
    if gpus > NODE and gpus % NODE == 0:
        within = 1 / NODE
        found.append(Sharding(f"hsdp, {gpus // NODE} x {NODE}", states(width * within, within, within, gathered)))
    return found


def _gathered_parameters(model: ByteModel) -> int:
    """What a full shard holds whole at a time: all outside the blocks, the block at work and the one fetched next.

    And the gradient of the block at work, before each rank takes its share.
    """
    blocks = sorted((sum(p.numel() for p in block.parameters()) for block in model.units()), reverse=True)
    return model.parameter_count() - sum(blocks) + sum(blocks[:2]) + sum(blocks[:1])


def activation_line(config: ModelConfig, dtype: torch.dtype, checkpointing: CheckpointingConfig) -> Line:
    """Measured for 1 row, for as many as fill the chunk in which the loss is computed, and for many."""
    chunk = -(-CHUNK // config.sequence_length)
    rows = sorted({1, chunk, max(MANY_ROWS, 2 * chunk)})
    return Line(tuple((count, measure_activations(config, count, dtype, checkpointing).peak) for count in rows))


def measure_activations(
    config: ModelConfig, rows: int, dtype: torch.dtype, checkpointing: CheckpointingConfig = KEEP_ALL
) -> Activations:
    """Of a micro-batch of full rows, with parameters and activations of a type; see `activations_of`.

    Args:
        checkpointing: not of mode budget, which only a compiler can tell.
    """
    model = on_meta(config).to(dtype)
    recompute(checkpointing, model)
    return activations_of(model, torch.empty(rows, config.sequence_length, dtype=torch.int16, device="meta"))


def activations_of(model: ByteModel, ids: Tensor) -> Activations:
    """Of a pass over (rows, T) ids, on the meta device or a real one. Use the model for nothing else afterwards.

    Its blocks keep for backward what they are told to (`Unit.keeps`).
    """
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    if ids.is_meta:
        for block in model.units():
            block.forward = partial(_with_fused_attention, block.forward)  # in backward too, where it runs again
    with _LiveTensors() as live:
        loss = mean_price(model, ids)
        kept = live.bytes
        loss.backward()
    return Activations(kept, live.peak)


def measure_kept(config: ModelConfig, rows: int, dtype: torch.dtype) -> int:
    """`Activations.kept` without checkpointing, in a fraction of the time: blocks that are alike keep alike."""
    model = on_meta(config).to(dtype)
    ids = torch.empty(rows, config.sequence_length, dtype=torch.int16, device="meta")
    with _FusedAttentionMode(), _LiveTensors() as live:
        alike = _Alike(live)
        for block in model.units():
            block.forward = partial(alike.run, block, block.forward)
        loss = mean_price(model, ids)
        kept = live.bytes
    del loss  # held until now, with all that it needs
    return kept


def mean_price(model: ByteModel, ids: Tensor) -> Tensor:
    """Of a training pass, with memory where the model carries one."""
    memory = model.empty_memory(len(ids))
    nats: Tensor = model(ids, memory)[0] if memory else model(ids)
    return nats.mean()


def on_meta(config: ModelConfig) -> ByteModel:
    """A model of shapes without data: the largest costs nothing."""
    with torch.device("meta"):
        return build_model(config)


def _with_fused_attention(forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with _FusedAttentionMode():
        return forward(*arguments)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._meet(made.untyped_storage(), given)
        return result

    def _meet(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address = storage._cdata
        if address in self._known or address in given:
            return
        self._known.add(address)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


class _Alike:
    """Blocks of one kind. The first two run; for each after them stands a tensor of the bytes that the second kept.

    The first is no measure: what blocks share is counted with it.
    """

    def __init__(self, live: _LiveTensors) -> None:
        self._live = live
        self._kept: dict[Any, list[int]] = {}
        """What each that ran has kept, by kind."""

    def run(self, block: Unit, forward: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
        kinds = tuple(type(module) for module in block.modules())
        shapes = tuple(parameter.shape for parameter in block.parameters())
        kept = self._kept.setdefault((kinds, shapes, x.shape), [])
        if len(kept) == 2:
            return _Keep.apply(x, kept[1])
        before = self._live.bytes
        result = forward(x, *others)
        kept.append(self._live.bytes - before)
        return result


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(torch.empty(size, dtype=torch.uint8, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError


class _FusedAttentionMode(TorchFunctionMode):
    """Puts `_FusedAttention` in the place of scaled_dot_product_attention."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        q, k, v = args
        bias = kwargs.get("attn_mask")
        if bias is not None and bias.dtype == torch.bool:
            bias = bias.to(q.dtype)  # as the kernels take it
        return _FusedAttention.apply(q, k, v, bias, kwargs.get("dropout_p", 0.0))


class _FusedAttention(torch.autograd.Function):
    """The shapes that go into and out of a fused kernel, and what it keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        output, log_sum = flash_attention(q, k, v, dropout)  # of the shapes
        ctx.save_for_backward(q, k, v, bias, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, _, _ = ctx.saved_tensors
        of_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_bias, None
