"""Activations of a training step on a GPU, measured without a GPU.

The model's own forward and backward pass run on the meta device, where tensors have shapes and no data, and every
tensor that lives is counted. No formula of a model is needed, so none can be wrong. Attention is counted as a GPU's
fused kernels compute it: they keep queries, keys, values, output and one fp32 number per query and head, but no scores.
"""

import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

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

MANY_ROWS = 64
"""Activations are measured up to so many rows, or what fills two chunks of the loss. Lines between are right to some
hundredths."""
MOST_ROWS = 1 << 40
"""More than any memory holds: where the search for the largest micro-batch ends."""
KEEP_ALL = CheckpointingConfig()


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward and backward pass, beside parameters and their gradients."""

    kept: int
    """When the forward pass is done: what the backward pass needs."""
    peak: int
    """At most, on the way there and back: with logits, passing gradients and what is computed again."""


@dataclass(frozen=True)
class ActivationLine:
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


def activation_line(config: ModelConfig, dtype: torch.dtype, checkpointing: CheckpointingConfig) -> ActivationLine:
    """Measured for 1 row, for as many as fill the chunk in which the loss is computed, and for many."""
    chunk = -(-CHUNK // config.sequence_length)
    rows = sorted({1, chunk, max(MANY_ROWS, 2 * chunk)})
    return ActivationLine(
        tuple((count, measure_activations(config, count, dtype, checkpointing).peak) for count in rows)
    )


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
        loss = mean_loss(model, ids)
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
        loss = mean_loss(model, ids)
        kept = live.bytes
    del loss  # held until now, with all that it needs
    return kept


def mean_loss(model: ByteModel, ids: Tensor) -> Tensor:
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
