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
from pretrain.distributed.context import Context
from pretrain.engines import CheckpointingConfig
from pretrain.engines.blocks import recompute
from pretrain.models import ByteModel, ModelConfig
from pretrain.models.blocks.nats import CUDA_CHUNK
from pretrain.models.blocks.unit import Unit
from pretrain.models.finetune import FinetuneConfig, build_finetuned

MANY_ROWS = 64
"""Largest measured number of rows, unless two chunks of the loss have more. Between measurements the error is a few
percent."""
MOST_ROWS = 1 << 40
"""Upper bound of the search for the largest micro-batch; no memory holds it."""
SUM_WIDTH = 4
"""Bytes of an element in sums of gradients over ranks, in any precision."""
KEEP_ALL = CheckpointingConfig()
"""Config without activation checkpointing."""
TRAIN_ALL = FinetuneConfig()
"""Config without frozen parameters and adapters."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward and backward pass, without parameters and their gradients."""

    kept: int
    """Bytes that the backward pass needs, at the end of the forward pass."""
    peak: int
    """Largest number of bytes at any time, with logits, temporary gradients and recomputed activations."""
    gathering: int
    """The same of a fully sharded model, with the blocks that a rank has gathered at that time (`GatheredBlocks`)."""


class GatheredBlocks:
    """Bytes of gathered parameters and their gradients on a rank of a fully sharded model, as FSDP2 holds them.

    The parameters outside the blocks are whole throughout. A block's forward pass also holds the block, the buffer in
    which it was gathered, and the buffer of the next block. Its backward pass holds the block, the buffer of the block
    before it, the gradients that it has computed, and the fp32 buffer in which the gradient of the block after it is
    summed over ranks. At its end, its own gradient is copied to such a buffer.
    """

    def __init__(self, model: ByteModel) -> None:
        """Count the parameters of a model in the precision of the passes."""
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.units()]
        trained = [sum(p.numel() for p in block.parameters() if p.requires_grad) for block in model.units()]
        self._width = next(model.parameters()).element_size()
        self._outside = model.parameter_count() - sum(blocks)
        self._blocks = [0, *blocks, 0]
        self._trained = [0, *trained, 0]

    def in_forward(self, number: int) -> int:
        """Return the bytes during the forward pass of a block, by its place in `units()`, and until the next one."""
        _, own, following = self._blocks[number : number + 3]
        return self._width * (self._outside + 2 * own + following)

    def in_backward(self, number: int) -> int:
        """Return the bytes during the backward pass of a block, by its place in `units()`, without its gradients."""
        before, own, _ = self._blocks[number : number + 3]
        return self._width * (self._outside + own + before) + SUM_WIDTH * self._trained[number + 2]

    def at_sum(self, number: int) -> int:
        """Return the bytes when the gradient of a block is about to be summed over ranks."""
        before, own, _ = self._blocks[number : number + 3]
        trained = self._trained[number + 1]
        return self._width * (self._outside + own + trained + before) + SUM_WIDTH * trained


@dataclass(frozen=True)
class ActivationLine:
    """Peak bytes of activations as a function of the rows of a micro-batch: linear between and beyond measurements."""

    measured: tuple[tuple[int, int], ...]
    """Pairs (rows, bytes), two or more, in ascending order."""

    def at(self, rows: int) -> int:
        """Return the bytes of a micro-batch of `rows` rows."""
        ahead = min(max(bisect_left(self.measured, (rows,)), 1), len(self.measured) - 1)
        (few, low), (many, high) = self.measured[ahead - 1 : ahead + 1]
        return round(low + (high - low) * (rows - few) / (many - few))

    def rows_within(self, size: float) -> int:
        """Return the largest number of rows that need at most `size` bytes; 0 if one row needs more."""
        return bisect_right(range(1, MOST_ROWS), size, key=self.at)


@dataclass(frozen=True)
class ActivationLines:
    """Peak bytes of activations by rows."""

    whole: ActivationLine
    """With the whole model on each rank: `Activations.peak`."""
    gathering: ActivationLine
    """With a fully sharded model: `Activations.gathering`."""

    def of(self, *, gathers: bool) -> ActivationLine:
        """Return the line of a sharding, given whether it gathers blocks."""
        return self.gathering if gathers else self.whole


def activation_lines(
    config: ModelConfig,
    dtype: torch.dtype,
    checkpointing: CheckpointingConfig,
    context: int = 1,
    finetune: FinetuneConfig = TRAIN_ALL,
) -> ActivationLines:
    """Measure activations for 1 row, a quarter of the rows of one chunk of the loss, all of these, and many rows."""
    chunk = -(-CUDA_CHUNK * context // config.sequence_length)
    measured = {
        rows: measure_activations(config, rows, dtype, checkpointing, context, finetune)
        for rows in sorted({1, -(-chunk // 4), chunk, max(MANY_ROWS, 2 * chunk)})
    }
    return ActivationLines(
        ActivationLine(tuple((rows, found.peak) for rows, found in measured.items())),
        ActivationLine(tuple((rows, found.gathering) for rows, found in measured.items())),
    )


def measure_activations(
    config: ModelConfig,
    rows: int,
    dtype: torch.dtype,
    checkpointing: CheckpointingConfig = KEEP_ALL,
    context: int = 1,
    finetune: FinetuneConfig = TRAIN_ALL,
) -> Activations:
    """Measure the activations of a micro-batch of full rows on the meta device.

    Args:
        config: of the model.
        rows: of the micro-batch.
        dtype: type of parameters and activations.
        checkpointing: of any mode except budget, whose result only a compiler knows.
        context: ranks that share each row. The temporary tensors of attention over ranks are not counted.
        finetune: frozen parameters and adapters.
    """
    model = on_meta(config, finetune).to(dtype)
    model.set_context(Context(index=context - 1, size=context))
    recompute(checkpointing, model)
    return activations_of(model, torch.empty(rows, config.sequence_length, dtype=torch.int16, device="meta"))


def activations_of(model: ByteModel, ids: Tensor) -> Activations:
    """Measure the activations of a pass over (rows, T) ids, on the meta device or a real one.

    Blocks keep for backward what `Unit.keeps` says. The model cannot be used for anything else afterwards.
    """
    live = _LiveTensors()
    gathered = GatheredBlocks(model)
    for parameter in model.trained_parameters().values():
        parameter.register_post_accumulate_grad_hook(live.drop_gradient)
    for number, block in enumerate(model.units()):
        forward = partial(fused_attention, block.forward) if ids.is_meta else block.forward
        block.forward = partial(_in_block, live, gathered, number, forward)  # also when backward runs it again
    with live:
        loss = mean_loss(model, ids)
        kept = live.bytes
        loss.backward()
    live.note_gathered(gathered.at_sum(0))
    return Activations(kept, live.peak, live.gathering)


def measure_kept(config: ModelConfig, rows: int, dtype: torch.dtype) -> int:
    """Return `Activations.kept` without checkpointing, in a fraction of the time: equal blocks keep equally much."""
    model = on_meta(config).to(dtype)
    ids = torch.empty(rows, config.sequence_length, dtype=torch.int16, device="meta")
    with _FusedAttentionMode(), _LiveTensors() as live:
        alike = _Alike(live)
        for block in model.units():
            block.forward = partial(alike.run, block, block.forward)
        loss = mean_loss(model, ids)
        kept = live.bytes
    del loss  # it has kept all activations alive until here
    return kept


def mean_loss(model: ByteModel, ids: Tensor) -> Tensor:
    """Return the mean loss of a training pass, with an empty memory if the model carries one.

    A model that reads more than ids gets made-up examples of full length, as many as there are rows.
    """
    example, given = model.empty_example(len(ids), ids.device)
    if given is not None:
        loss: Tensor = model(example, given).mean()
        return loss
    memory = model.empty_memory(len(ids))
    nats: Tensor = model(ids, memory)[0] if memory else model(ids)
    return nats.mean()


def on_meta(config: ModelConfig, finetune: FinetuneConfig = TRAIN_ALL) -> ByteModel:
    """Return a model of shapes without data, which takes no memory, with adapters and frozen parameters.

    Raises:
        FinetuneError: the section `finetune` does not fit the model.
    """
    with torch.device("meta"):
        return build_finetuned(config, finetune)


def fused_attention(forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Run a block with attention that keeps what a GPU's fused kernel keeps, and has shapes only."""
    with _FusedAttentionMode():
        return forward(*arguments)


def _in_block(
    live: "_LiveTensors", gathered: GatheredBlocks, number: int, forward: Callable[..., Tensor], *arguments: Any
) -> Tensor:
    """Run a block, and set what is gathered during its forward and its backward pass."""

    def begin_backward(_: Tensor) -> None:
        if live.in_backward:
            live.note_gathered(gathered.at_sum(number + 1))
        live.in_backward = True
        live.note_gathered(gathered.in_backward(number))

    if live.in_backward:  # it computes activations again
        return forward(*arguments)
    live.note_gathered(gathered.in_forward(number))
    result = forward(*arguments)
    if result.requires_grad:  # else nothing below the block is trained
        result.register_hook(begin_backward)
    return result


class _LiveTensors(TorchDispatchMode):
    """Mode that counts the bytes of all live storages that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = self.gathering = 0
        self.in_backward = False
        """The backward pass of a block has begun."""
        self._gathered = 0
        """Bytes that a fully sharded model has gathered at this time."""
        self._known: set[int] = set()

    def note_gathered(self, size: int) -> None:
        """Set the bytes that a fully sharded model has gathered."""
        self._gathered = size
        self.gathering = max(self.gathering, self.bytes + size)

    def drop_gradient(self, parameter: Tensor) -> None:
        """Drop the gradient of a parameter, which a sharded model keeps until the block's gradients are summed."""
        assert parameter.grad is not None
        size = parameter.grad.nbytes if self.in_backward else 0
        parameter.grad = None
        self.note_gathered(self._gathered + size)

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
        self.gathering = max(self.gathering, self.bytes + self._gathered)
        weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


class _Alike:
    """Runner of blocks: runs the first two of each kind, and replaces the others by a tensor of equally many bytes.

    The second block gives the number of bytes. The first one also includes what blocks share.
    """

    def __init__(self, live: _LiveTensors) -> None:
        self._live = live
        self._kept: dict[Any, list[int]] = {}
        """Bytes that each block that ran has kept, by kind."""

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
    """Stand-in for a block, which keeps a number of bytes for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(torch.empty(size, dtype=torch.uint8, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError


class _FusedAttentionMode(TorchFunctionMode):
    """Mode that replaces scaled_dot_product_attention by `_FusedAttention`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        q, k, v = args
        bias = kwargs.get("attn_mask")
        if bias is not None and bias.dtype == torch.bool:
            bias = bias.to(q.dtype)  # the type that the kernels take
        return _FusedAttention.apply(q, k, v, bias, kwargs.get("dropout_p", 0.0))


class _FusedAttention(torch.autograd.Function):
    """Attention of shapes only: inputs, outputs and kept tensors of a fused kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
        output, log_sum = flash_attention(q, k, v, dropout)  # of the shapes
        if v.shape[-1] != q.shape[-1]:
            output = v.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, bias, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, _, _ = ctx.saved_tensors
        of_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_bias, None
