"""Stacks whose layers are named by a layout: Mamba-2 and attention, with or without a feed-forward layer.

    T1m4   one block of attention and a feed-forward layer, then four of Mamba-2 alone

A letter names a kind of block: m is Mamba-2, t is attention. M and T have a SwiGLU feed-forward layer too. A stack
ends with a norm. Blocks are those of H-Net (arXiv:2507.07955): RMSNorm before each layer, no biases, and rotary
positions, by default in half of each head.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field
from torch import Tensor, nn

from pretrain.models.blocks.attention import window_pairs
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.context import Dropout
from pretrain.models.blocks.feed_forward import FeedForward
from pretrain.models.blocks.mamba2 import Mamba2, MambaState
from pretrain.models.blocks.multi_head import Attention
from pretrain.models.blocks.norms import RMSNorm
from pretrain.models.blocks.positions import ROTARY_BASE, Rotary
from pretrain.models.blocks.transformer import linear_weights
from pretrain.models.blocks.unit import Unit, run_unit

Layout = Annotated[str, Field(pattern=r"^([mMtT][0-9]+)*$")]
"""Kinds of blocks, each with its number: T1m4."""
Cache = LayerCache | MambaState
"""Cache of a block in a decoder: keys and values of attention, or the state of a Mamba-2 layer."""


class MambaSizes(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Sizes of Mamba-2 layers."""

    head_width: int = Field(default=64, ge=1)
    """Channels of a head, which share a decay; divides expansion x width."""
    state: int = Field(default=128, ge=1)
    """Numbers that the state has for each inner channel."""
    expansion: int = Field(default=2, ge=1)
    """Inner channels by channel of the residual stream."""
    chunk: int = Field(default=64, ge=1)
    """Positions that training computes by products, between two steps of the recurrence. It changes the work, not the
    result."""


class RotaryConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Rotary angles of attention."""

    fraction: float = Field(default=0.5, gt=0, le=1)
    """Share of each head's channels that turn."""
    base: float = Field(default=ROTARY_BASE, gt=1)
    """Base of the frequencies."""


class LayoutConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Width of stacks, and sizes of their attention and feed-forward layers."""

    width: int = Field(ge=1)
    """Channels of the residual stream."""
    heads: int = Field(default=16, ge=1)
    """Attention heads; divides the width if there is attention."""
    feed_forward_width: int | None = Field(default=None, ge=8, multiple_of=8)
    """Channels between the two maps of a SwiGLU layer. Null: 8/3 of the width, rounded up to a multiple of 8."""

    def fault(self, layout: str, mamba: MambaSizes) -> str | None:
        """Return why a stack of these sizes cannot have a layout; None if it can."""
        kinds = {kind.lower() for kind in kinds_of(layout)}
        if "t" in kinds and self.width % self.heads:
            return f"heads ({self.heads}) does not divide width ({self.width})"
        inner = mamba.expansion * self.width
        if "m" in kinds and inner % mamba.head_width:
            return f"mamba.head_width ({mamba.head_width}) does not divide expansion x width ({inner})"
        return None


def kinds_of(layout: str) -> Iterator[str]:
    """Yield the kind of each block of a layout."""
    for kind, number in re.findall(r"([mMtT])([0-9]+)", layout):
        yield from kind * int(number)


def additions(layout: str) -> int:
    """Return how often blocks of a layout add to the residual stream: twice with a feed-forward layer, else once."""
    return sum(1 + kind.isupper() for kind in kinds_of(layout))


class LayoutBlock(Unit):
    """Pre-norm block: x + mixer(norm(x)), and then x + feed_forward(norm(x)) if there is a feed-forward layer."""

    def __init__(self, width: int, mixer: Attention | Mamba2, feed_forward: FeedForward | None, dropout: float) -> None:
        """Build the norms around the layers.

        Args:
            width: channels of the residual stream.
            mixer: attention or Mamba-2.
            feed_forward: feed-forward layer, if there is one.
            dropout: share of the output of each layer that is dropped in training.
        """
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = mixer
        self.feed_forward_norm = None if feed_forward is None else RMSNorm(width)
        self.feed_forward = feed_forward
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        """Map (rows, n, width) to the same shape.

        Args:
            x: residual stream.
            cache: of the mixer, which updates it; None computes whole rows.
        """
        x = x + self.dropout(self.mixer(self.norm(x), cache))
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class LayoutStack(nn.Module):
    """Blocks of a layout in order, and a norm after them."""

    def __init__(
        self,
        layout: str,
        sizes: LayoutConfig,
        mamba: MambaSizes,
        rotary: RotaryConfig,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        """Build the blocks.

        Args:
            layout: kinds of the blocks.
            sizes: of the stack.
            mamba: sizes of Mamba-2 layers.
            rotary: angles of attention.
            window: positions that attention sees; None means all before it.
            dropout: share of attention weights and of the output of each layer that is dropped in training.
        """
        super().__init__()
        width, self.window = sizes.width, window
        angles = Rotary.of_base(rotary.base, width // sizes.heads, rotary.fraction)
        self.blocks = nn.ModuleList()
        for kind in kinds_of(layout):
            mixer: Attention | Mamba2 = (
                Attention(width, sizes.heads, dropout, angles, window)
                if kind in "tT"
                else Mamba2(width, mamba.head_width, mamba.state, mamba.expansion, mamba.chunk)
            )
            hidden = None if sizes.feed_forward_width is None else 3 * sizes.feed_forward_width // 2
            feed_forward = FeedForward(width, "swiglu", hidden) if kind.isupper() else None
            self.blocks.append(LayoutBlock(width, mixer, feed_forward, dropout))
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Map (rows, n, width) to the same shape.

        Args:
            x: input of the first block.
            caches: one a block; see `empty_caches`.
        """
        normed: Tensor = self.norm(self.run_blocks(x, caches))
        return normed

    def run_blocks(self, x: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Map (rows, n, width) to the same shape, without the norm after the blocks."""
        for index, block in enumerate(self.blocks):
            x = run_unit(block, x, None if caches is None else caches[index])
        return x

    def empty_caches(self) -> list[Cache]:
        """Return an empty cache for each block."""
        limit = None if self.window is None else self.window - 1
        return [MambaState() if isinstance(mixer, Mamba2) else LayerCache(limit) for mixer in self._mixers()]

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products over one row of `length` positions."""
        total = 2 * length * linear_weights(self)
        for mixer in self._mixers():
            if isinstance(mixer, Mamba2):
                total += mixer.scan_flops(length)
            else:
                total += 4 * window_pairs(length, self.window) * self.norm.weight.numel()
        return total

    def _mixers(self) -> Iterator[nn.Module]:
        for block in self.blocks:
            assert isinstance(block, LayoutBlock)
            yield block.mixer
