"""Parts that models are made of: causal pre-norm Transformer blocks and cross-attends, with caches for decoding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from pretrain.kernels import amx_attention
from pretrain.models.base import Initial
from pretrain.models.blocks.unit import Unit, run_unit

Activation = Literal["relu", "squared_relu", "gelu", "swiglu"]

EXPLICIT_ATTENTION_LENGTH = 256
"""In bf16 on a CPU, attention up to this length that amx_attention does not take is computed as two products and a
softmax: the fused kernel's backward pass took 2.3 times as long at length 8 and 1.5 times at 256, and a third of it at
1,024 (torch 2.13, 2 cores, AMX)."""

SMALLEST_CACHE = 16
"""Positions that a layer's cache has room for at first, at least."""

LARGEST_FUSED_BATCH = 65_536
"""CUDA's fused kernels refuse a first dimension this large (pytorch issue 142228); the patches of all rows can be."""


class StackConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Size of one stack of Transformer blocks."""

    width: int = Field(ge=1)
    """Channels of the residual stream."""
    layers: int = Field(ge=0)
    """Transformer blocks."""
    heads: int = Field(ge=1)
    """Attention heads; divides the width."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) does not divide width ({self.width})")
        return self


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): channels i and i + n/2 of a head's first n channels turn with the position."""

    fraction: float = 1.0
    """Share of a head's channels that turn; their number is rounded down to an even one."""
    longest_wavelength: float | None = None
    """As of `frequencies`."""


@dataclass(frozen=True)
class Past:
    """What queries see: query i of a row sees the keys up to first + i, its own among them."""

    first: Tensor
    """(rows,)"""

    def mask(self, queries: int, keys: int) -> Tensor:
        """(rows, 1, queries, keys) booleans"""
        last = self.first[:, None] + torch.arange(queries, device=self.first.device)
        return torch.arange(keys, device=last.device) <= last[:, None, :, None]


def embedding(symbols: int, width: int) -> nn.Embedding:
    """One whose values the model gives it, as all of its own: nn.Embedding would draw some, and import torch's compiler
    for that on the meta device."""
    return nn.Embedding.from_pretrained(torch.empty(symbols, width), freeze=False)


class LayerCache:
    """Keys and values of one layer for the positions decoded so far: (rows, heads, kept, width / heads) each.

    They lie in a buffer that grows to twice what it holds, so that a position more does not copy those before.
    """

    def __init__(self, limit: int | None = None) -> None:
        """Keeps the last `limit` positions between two calls of `append`; None keeps all."""
        self.limit = limit
        self.length = 0
        """Positions appended so far, kept or not."""
        self._buffer: Tensor | None = None
        """(2, rows, heads, room, width / heads)"""
        self._span = slice(0, 0)
        """What is kept, in the buffer's room."""

    @property
    def kept(self) -> int:
        return self._span.stop - self._span.start

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The kept positions and these after them. What is returned is not to be written to."""
        kept, count = self.kept, keys.shape[2]
        if self._buffer is None or self._span.stop + count > self._buffer.shape[3]:
            room = max(2 * (kept + count), SMALLEST_CACHE)
            buffer = keys.new_empty(2, *keys.shape[:2], room, keys.shape[3])
            if self._buffer is not None:
                buffer[:, :, :, :kept] = self._buffer[:, :, :, self._span]
            self._buffer, self._span = buffer, slice(0, kept)
        last = self._span.stop
        self._buffer[0, :, :, last : last + count] = keys
        self._buffer[1, :, :, last : last + count] = values
        self._span = slice(self._span.start, last + count)
        all_keys, all_values = self._buffer[:, :, :, self._span]
        self.length += count
        if self.limit is not None:
            self.keep_last(self.limit)
        return all_keys, all_values

    def keep_last(self, count: int) -> None:
        self._span = slice(max(self._span.stop - count, self._span.start), self._span.stop)

    def clear(self) -> None:
        """As new."""
        self.length = 0
        self._span = slice(0, 0)


class MultiHead(nn.Module):
    """The projections around any multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query_key_value = nn.Linear(width, 3 * width, bias)
        self.output = nn.Linear(width, width, bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, length, width) to queries, keys and values, each (rows, heads, length, width / heads)."""
        rows, length, width = x.shape
        qkv = self.query_key_value(x).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, mixed: Tensor) -> Tensor:
        """(rows, heads, length, width / heads) to (rows, length, width)."""
        return self.output(mixed.transpose(1, 2).flatten(2))

    @property
    def dropout_now(self) -> float:
        return self.dropout if self.training else 0.0


class Attention(MultiHead):
    """Causal multi-head self-attention, with rotary positions and a sliding window by option.

    With a window of w, a position sees itself and the w - 1 before it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        rotary: Rotary | None = None,
        window: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(width, heads, dropout, bias)
        self.rotary, self.window = rotary, window

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(rows, length, width) to the same; with a cache, `x` goes on after what the cache holds.

        The cache is empty, or `x` is one position long. With a window of w, its limit is w - 1.
        """
        q, k, v = self.project(x)
        if self.rotary:
            first = cache.length if cache is not None else 0
            places = torch.arange(first, first + x.shape[1], device=x.device)
            q, k = rotate(q, places, self.rotary), rotate(k, places, self.rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.window is None:
            return self.merge(causal_attention(q, k, v, self.dropout_now))
        return self.merge(window_attention(q, k, v, self.window, self.dropout_now))


class CrossAttention(nn.Module):
    """Multi-head attention of latents to inputs, with rotary positions by option.

    Queries, keys and values have the inputs' width; the output has the latents'.
    """

    def __init__(self, width: int, input_width: int, heads: int, rotary: Rotary | None, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.query = nn.Linear(width, input_width, bias)
        self.key_value = nn.Linear(input_width, 2 * input_width, bias)
        self.output = nn.Linear(input_width, width, bias)

    def forward(
        self,
        latents: Tensor,
        inputs: Tensor,
        places: Tensor,
        visible: Tensor | Past | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Of latents to the inputs they may see.

        Args:
            latents: (rows, N, width)
            inputs: (rows, M, input_width); with a cache, they go on after what it holds.
            places: (rows, N) or (N,), each latent's position among the inputs.
            visible: as `attention` takes it, over the inputs of the cache and these.
        """
        rows, length, input_width = inputs.shape
        q = self.query(latents).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.key_value(inputs).view(rows, length, 2, self.heads, input_width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        if self.rotary:
            first = cache.length if cache is not None else 0
            q = rotate(q, places, self.rotary)
            k = rotate(k, torch.arange(first, first + length, device=inputs.device), self.rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.output(attention(q, k, v, visible).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear maps with an activation between; SwiGLU (Shazeer 2020) with the same number of parameters."""

    def __init__(self, width: int, activation: Activation, hidden: int | None = None, bias: bool = False) -> None:
        """`hidden` channels between the maps; None is 4 times the width."""
        super().__init__()
        self.activation = activation
        hidden = 4 * width if hidden is None else hidden
        if activation == "swiglu":
            hidden = -(-2 * hidden // 3 // 8) * 8
            self.expand = nn.Linear(width, 2 * hidden, bias)
        else:
            self.expand = nn.Linear(width, hidden, bias)
        self.contract = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        if self.activation == "relu":
            hidden = F.relu_(hidden)
        elif self.activation == "squared_relu":
            hidden = _Square.apply(F.relu_(hidden))
        elif self.activation == "gelu":
            hidden = F.gelu(hidden)
        else:
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        return self.contract(hidden)


class _Square(torch.autograd.Function):
    """x², with a backward of two passes over memory where torch's own takes four."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (gradient * x).mul_(2)


class PreNorm(Unit):
    """What all blocks have: attention and a feed-forward layer, each behind a norm, added to the residual stream.

    Args:
        dropout: of what each of the two adds.
    """

    def __init__(self, width: int, attention: nn.Module, feed_forward: FeedForward, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        """The residual stream after both, of what attention made of it."""
        x = x + self.dropout(attended)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Block(PreNorm):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): the pre-norm block."""

    def forward(self, x: Tensor, cache: LayerCache | None = None, *shared: Tensor) -> Tensor:
        """(rows, length, width) to the same; the rest goes to the attention."""
        return self.add(x, self.attention(self.attention_norm(x), cache, *shared))


class CrossBlock(PreNorm):
    """A block whose attention is of latents to inputs, each with a norm of its own."""

    attention: CrossAttention

    def __init__(
        self, width: int, input_width: int, attention: CrossAttention, feed_forward: FeedForward, dropout: float
    ) -> None:
        super().__init__(width, attention, feed_forward, dropout)
        self.input_norm = nn.LayerNorm(input_width)

    def forward(
        self, z: Tensor, inputs: Tensor, places: Tensor, visible: Tensor | Past | None, cache: LayerCache | None = None
    ) -> Tensor:
        """(rows, N, width) to the same; arguments as `CrossAttention.forward`."""
        return self.add(z, self.attention(self.attention_norm(z), self.input_norm(inputs), places, visible, cache))


AttentionMaker = Callable[[int, int, float], MultiHead]
"""Width, heads and dropout to one layer's attention."""


class Stack(nn.Module):
    """Blocks and the final norm that a pre-norm stack ends with."""

    def __init__(
        self, config: StackConfig, activation: Activation, dropout: float, attention: AttentionMaker = Attention
    ) -> None:
        super().__init__()
        self.width = config.width
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                attention(config.width, config.heads, dropout),
                FeedForward(config.width, activation),
                dropout,
            )
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, caches: list[LayerCache] | None = None, *shared: Tensor) -> Tensor:
        """(rows, length, width) to the same; with caches (one a block), as `Attention.forward`.

        What is `shared` goes to the attention of every block.
        """
        for index, block in enumerate(self.blocks):
            x = run_unit(block, x, caches[index] if caches is not None else None, *shared)
        return self.norm(x)

    def empty_caches(self, limit: int | None = None) -> list[LayerCache]:
        return [LayerCache(limit) for _ in self.blocks]

    def flops(self, length: int, pairs: int | None = None) -> int:
        """Of the matrix products over one row of `length` positions: 2 a weight and position, and attention.

        Args:
            pairs: of a query and a key that attention multiplies, masked or not; None is all length².
        """
        attention = len(self.blocks) * 4 * (length * length if pairs is None else pairs) * self.width
        return 2 * length * linear_weights(self) + attention


def linear_weights(module: nn.Module) -> int:
    """Weights of every linear map in a module; a position costs two operations with each."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def initial_of(name: str, std: float) -> Initial:
    """What a parameter begins as: norms as the identity, all else drawn with a deviation."""
    if "norm" in name:
        return Initial(mean=float(name.endswith("weight")))
    return Initial(std)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Attention of (rows, heads, queries, d) over as many keys, causal, or of one last query over all keys."""
    queries, keys = q.shape[2], k.shape[2]
    if queries not in (1, keys):
        raise ValueError(f"{queries} queries over {keys} keys: neither one query nor as many as keys")
    if queries == 1:
        return attention(q, k, v, None, dropout)
    if amx_attention.takes(q, k):
        return amx_attention.causal_attention(q, k, v, q.new_zeros(q.shape[0], dtype=torch.long), dropout)
    if _fused_is_right(q, k):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    past = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    return _explicit_attention(q, k, v, past, dropout)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | Past | None, dropout: float = 0.0) -> Tensor:
    """Attention of (rows, heads, queries, d) over any number of keys.

    Args:
        visible: expands to (rows, heads, queries, keys): booleans, true where a query sees a key, or numbers that are
            added to the scores; or the past alone. Every query sees a key. None: all keys.
    """
    if isinstance(visible, Past):
        if amx_attention.takes(q, k):
            return amx_attention.causal_attention(q, k, v, visible.first, dropout)
        visible = visible.mask(q.shape[2], k.shape[2])
    if _fused_is_right(q, k):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
    return _explicit_attention(q, k, v, visible, dropout)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float) -> Tensor:
    """As `causal_attention`, but a position sees itself and the window - 1 before it.

    The sequence is cut into blocks of one window, and each block attends to itself and to the block before it: cost
    grows with length x window, and no kernel of its own is needed.
    """
    rows, length = q.shape[0], q.shape[2]
    if length <= window:
        return causal_attention(q, k, v, dropout)
    blocks = -(-length // window)

    def cut(x: Tensor) -> Tensor:
        """To (rows, blocks, heads, window, d); what fills the last block comes after all and is seen by none."""
        return F.pad(x, (0, 0, 0, blocks * window - length)).unflatten(2, (blocks, window)).transpose(1, 2)

    q, k, v = cut(q), cut(k), cut(v)
    first = causal_attention(q[:, 0], k[:, 0], v[:, 0], dropout)
    k, v = (torch.cat([x[:, :-1], x[:, 1:]], 3).flatten(0, 1) for x in (k, v))
    later = attention(q[:, 1:].flatten(0, 1), k, v, _band(window, q.device), dropout)
    mixed = torch.cat([first[:, None], later.unflatten(0, (rows, blocks - 1))], 1)
    return mixed.transpose(1, 2).flatten(2, 3)[:, :, :length]


def window_pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that `window_attention` multiplies over one row; without a window, all."""
    if window is None or length <= window:
        return length * length
    return window * window * (2 * -(-length // window) - 1)


def _band(window: int, device: torch.device) -> Tensor:
    """(window, 2 window): what a block's positions see of the block before it and of itself."""
    age = torch.arange(window, 2 * window, device=device)[:, None] - torch.arange(2 * window, device=device)
    return (age >= 0) & (age < window)


def describe_attention(device: torch.device, dtype: torch.dtype) -> str:
    """How attention is computed, as `causal_attention` and `attention` choose."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        ways = f"two products and a softmax up to {EXPLICIT_ATTENTION_LENGTH} keys, torch's fused kernel above"
        if amx_attention.is_available():
            ways = (
                f"Byteloom's kernel for AMX where causal over {amx_attention.SHORTEST} positions or more; else {ways}"
            )
        return ways
    if device.type == "cuda":
        return (
            f"torch's fused kernel below {LARGEST_FUSED_BATCH:,} rows or patches, two products and a softmax from there"
        )
    return "torch's fused kernel"


def _fused_is_right(q: Tensor, k: Tensor) -> bool:
    """Whether the fused kernel is faster here, and takes this shape."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= EXPLICIT_ATTENTION_LENGTH
    refused = q.device.type == "cuda" and q.shape[0] >= LARGEST_FUSED_BATCH
    return not (slow or refused)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if visible is not None:
        seen = visible.dtype == torch.bool
        scores = scores.masked_fill(~visible, float("-inf")) if seen else scores + visible
    return F.dropout(scores.softmax(-1), dropout) @ v


def rotate(x: Tensor, places: Tensor, rotary: Rotary) -> Tensor:
    """(rows, heads, length, d) turned to positions `places`, (length,) or (rows, length); angles in fp32 at least."""
    half = int(x.shape[-1] * rotary.fraction) // 2
    cos, sin = _turns(places, half, rotary.longest_wavelength, x.dtype)
    if places.dim() > 1:
        cos, sin = cos[:, None], sin[:, None]  # the same for all heads
    return _Turn.apply(x, cos, sin)


@torch.library.custom_op("byteloom::turns", mutates_args=())
def _turns(places: Tensor, half: int, longest_wavelength: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (..., half), of rotary angles at places (...).

    An operation of its own, as a compiler would write it into the loop that turns, and compute each angle anew for each
    row and head: two fifths of a compiled block of Perceiver AR on a CPU.
    """
    precise = torch.promote_types(dtype, torch.float32)
    angles = places[..., None] * frequencies(half, longest_wavelength, places.device, precise)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@_turns.register_fake
def _(places: Tensor, half: int, longest_wavelength: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*places.shape, half)
    return places.new_empty(shape, dtype=dtype), places.new_empty(shape, dtype=dtype)


class _Turn(torch.autograd.Function):
    """Channels i and i + n/2 of the first n turned by angles given as (..., n/2) cosines and sines.

    The gradient is turned back. By itself torch would build it of five padded pieces.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    turned = x.clone(memory_format=torch.contiguous_format)
    a, b = x[..., :half], x[..., half : 2 * half]
    turned[..., :half].mul_(cos).addcmul_(b, sin, value=-1)
    turned[..., half : 2 * half].mul_(cos).addcmul_(a, sin)
    return turned


def sinusoids(places: Tensor, width: int, longest_wavelength: float | None = None) -> Tensor:
    """(n,) positions to (n, width) fp32 sines, then cosines, of angles with `frequencies`; an odd last channel is 0."""
    angles = places[:, None] * frequencies(width // 2, longest_wavelength, places.device, torch.float32)
    return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


def frequencies(count: int, longest_wavelength: float | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(count,) radians a position.

    Args:
        longest_wavelength: they fall from 1 to one over this, both ends included, as in Perceiver AR's code. None: they
            are 10,000^(-i / count), as in the papers of the Transformer and of rotary positions.
    """
    steps = torch.arange(count, device=device, dtype=dtype)
    if longest_wavelength is None:
        return 10_000.0 ** (-steps / count)
    return longest_wavelength ** (-steps / max(count - 1, 1))
