"""Attention between positions and patches (Byte Latent Transformer, arXiv:2412.09871, sections 3.2.2 and 3.3.1).

A patch has several slots, which are vectors of the width of positions. Each position belongs to one patch, so a slot
attends to the positions of its patch, and a position to the slots of one patch. Both are sums over positions, whose
cost grows with their number. No mask of patches by positions exists, and a patch without positions gives zeros.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.context import Dropout
from pretrain.models.blocks.feed_forward import FeedForward
from pretrain.models.blocks.norms import RMSNorm
from pretrain.models.blocks.transformer import TransformerBlock
from pretrain.models.blocks.unit import Unit

Pooling = Literal["max", "mean", "min"]


class PatchAttention(nn.Module):
    """Norms and linear maps of attention between positions and the slots of patches."""

    def __init__(self, width: int, heads: int, residual: int, dropout: float) -> None:
        """Build the layer.

        Args:
            width: channels of positions and of slots.
            heads: attention heads; they divide the width.
            residual: factor of the input that is added to the output: 1 by the paper's equations, 2 by its code.
            dropout: share of the output that is dropped in training.
        """
        super().__init__()
        self.heads, self.residual = heads, residual
        self.query_norm, self.input_norm = RMSNorm(width), RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.dropout = Dropout(dropout)

    def own_fused_matrices(self) -> dict[str, int]:
        """Return the matrices of keys and values; see `FusesMatrices`."""
        return {"key_value.weight": 2}

    def queries(self, x: Tensor) -> Tensor:
        """Map (..., width) to queries, (..., heads, width / heads)."""
        return self.query(self.query_norm(x)).unflatten(-1, (self.heads, -1))

    def keys_values(self, inputs: Tensor) -> Tensor:
        """Map (..., width) to keys and values, (..., 2, heads, width / heads)."""
        return self.key_value(self.input_norm(inputs)).unflatten(-1, (2, self.heads, -1))

    def add(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add the output for (..., heads, width / heads) mixed values to (..., width) inputs."""
        added: Tensor = self.dropout(self.output(mixed.flatten(-2).to(x.dtype)))
        return self.residual * x + added


class SlotBlock(Unit):
    """Block in which the slots of each patch attend to its positions."""

    def __init__(self, width: int, heads: int, residual: int, dropout: float) -> None:
        """Build the block; see `PatchAttention`."""
        super().__init__()
        self.attention = PatchAttention(width, heads, residual, dropout)

    def forward(self, slots: Tensor, x: Tensor, patch: Tensor) -> Tensor:
        """Map the slots of patches to the same shape.

        Args:
            slots: (rows, K, k, width)
            x: (rows, n, width) positions.
            patch: (rows, n) patch of each position; K if it belongs to none of them.

        Returns:
            (rows, K, k, width)
        """
        count, layer = slots.shape[1], self.attention
        q = spread(layer.queries(slots), patch.clamp(max=count - 1))  # (rows, n, k, heads, d)
        k, v = layer.keys_values(x)[:, :, None].unbind(3)
        scores = _products(q, k)
        highest = _reduced(scores.detach(), patch, count + 1, "amax")
        weights = (scores - _take(highest, patch)).exp()
        total = gathered(weights, patch, count + 1)[:, :count].clamp(min=1)  # the highest weight is 1; 0 without any
        mixed = gathered(weights[..., None] * v, patch, count + 1)[:, :count] / total[..., None]
        return layer.add(slots, mixed)


class ReadingBlock(TransformerBlock):
    """Transformer block whose positions first attend to the slots of a patch."""

    def __init__(
        self, width: int, attention: nn.Module, feed_forward: FeedForward, dropout: float, reading: PatchAttention
    ) -> None:
        """Build the block; `reading` attends to the slots, and the rest is a `TransformerBlock` with RMS norms."""
        super().__init__(width, attention, feed_forward, dropout, RMSNorm)
        self.reading = reading

    def forward(self, x: Tensor, cache: LayerCache | None = None, *shared: Any) -> Tensor:
        """Map (rows, n, width) to the same shape.

        Args:
            x: residual stream.
            cache: passed to the attention layer.
            *shared: the mask of the attention layer, (rows, K, k, width) slots, and (rows, n) patch of each position.
        """
        visible, slots, patch = shared
        return super().forward(self.read(x, slots, patch), cache, visible)

    def read(self, x: Tensor, slots: Tensor, patch: Tensor) -> Tensor:
        """Return the (rows, n, width) positions after attention to the slots; see `forward`."""
        k, v = spread(self.reading.keys_values(slots), patch).unbind(3)  # (rows, n, k, heads, d)
        weights = _products(self.reading.queries(x)[:, :, None], k).softmax(2)
        return self.reading.add(x, (weights[..., None] * v).sum(2))


def pool(x: Tensor, patch: Tensor, count: int, how: Pooling) -> Tensor:
    """Return the maximum, mean or minimum of each channel over the positions of each patch.

    Args:
        x: (rows, n, width)
        patch: (rows, n) patch of each position; `count` if it belongs to none.
        count: number of patches.
        how: maximum, mean or minimum.

    Returns:
        (rows, count, width); zeros for patches without positions.
    """
    reduce = {"max": "amax", "mean": "mean", "min": "amin"}[how]
    return _reduced(x, patch, count + 1, reduce)[:, :count]


def spread(slots: Tensor, patch: Tensor) -> Tensor:
    """Return the (rows, n, ...) slots of the patch of each position, given those of all patches, (rows, K, ...)."""
    return _Spread.apply(slots, patch)


def gathered(x: Tensor, patch: Tensor, count: int) -> Tensor:
    """Return the sums of (rows, n, ...) values over the positions of each patch, (rows, count, ...)."""
    flat = x.flatten(0, 1)
    sums = flat.new_zeros(len(x) * count, *flat.shape[1:]).index_add(0, _flat(patch, count), flat)
    return sums.unflatten(0, (len(x), count))


class _Spread(torch.autograd.Function):
    """Selection of patches for positions, whose gradient is summed in fp32 or more precise."""

    @staticmethod
    def forward(ctx: Any, slots: Tensor, patch: Tensor) -> Tensor:
        ctx.save_for_backward(patch)
        ctx.count = slots.shape[1]
        return _take(slots, patch)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (patch,) = ctx.saved_tensors
        precise = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return gathered(precise, patch, ctx.count).to(gradient.dtype), None


def _flat(patch: Tensor, count: int) -> Tensor:
    """Return the numbers of patches among those of all rows, (rows * n,)."""
    return (patch + count * torch.arange(len(patch), device=patch.device)[:, None]).flatten()


def _take(slots: Tensor, patch: Tensor) -> Tensor:
    return slots.flatten(0, 1).index_select(0, _flat(patch, slots.shape[1])).unflatten(0, patch.shape)


def _reduced(x: Tensor, patch: Tensor, count: int, reduce: str) -> Tensor:
    """Return a reduction of (rows, n, ...) values over each patch, (rows, count, ...); zeros without any position."""
    flat = x.flatten(2)
    index = patch[..., None].expand_as(flat)
    zeros = flat.new_zeros(len(x), count, flat.shape[2])
    return zeros.scatter_reduce(1, index, flat, reduce, include_self=False).unflatten(2, x.shape[2:])


def _products(q: Tensor, k: Tensor) -> Tensor:
    """Return the scaled products of queries and keys over the last dimension, in fp32 or more precise."""
    precise = torch.promote_types(q.dtype, torch.float32)
    return (q * k).sum(-1, dtype=precise) * q.shape[-1] ** -0.5
