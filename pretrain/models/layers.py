"""Parts that models are made of: a stack of causal pre-norm Transformer blocks, with a cache for decoding."""

from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

Activation = Literal["relu", "gelu", "swiglu"]

EXPLICIT_ATTENTION_LENGTH = 256
"""In bf16 on a CPU, attention up to this length is computed as two products and a softmax: the fused kernel's backward
pass took 2.3 times as long at length 8 and 1.5 times at 256, and a third of it at 1,024 (torch 2.13, 2 cores, AMX)."""


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


class LayerCache:
    """Keys and values of one layer for the positions decoded so far: (rows, heads, length, width / heads) each."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            self.keys = torch.cat([self.keys, keys], 2)
            self.values = torch.cat([self.values, values], 2)
        return self.keys, self.values


class Attention(nn.Module):
    """Causal multi-head self-attention, with rotary positions (Su et al. 2021) by option."""

    def __init__(self, width: int, heads: int, rotary: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.rotary, self.dropout = heads, rotary, dropout
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """(rows, length, width) to the same; with a cache, `x` goes on after what the cache holds.

        The cache is empty, or `x` is one position long.
        """
        rows, length, width = x.shape
        qkv = self.query_key_value(x).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.rotary:
            first = cache.length if cache is not None else 0
            q, k = rotate(q, first), rotate(k, first)
        if cache is not None:
            k, v = cache.append(k, v)
        mixed = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        return self.output(mixed.transpose(1, 2).reshape(rows, length, width))


class FeedForward(nn.Module):
    """Two linear maps with an activation between; SwiGLU (Shazeer 2020) with the same number of parameters."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        hidden = 4 * width
        if activation == "swiglu":
            hidden = -(-8 * width // 3 // 8) * 8
            self.expand = nn.Linear(width, 2 * hidden, bias=False)
        else:
            self.expand = nn.Linear(width, hidden, bias=False)
        self.contract = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x)
        if self.activation == "relu":
            hidden = F.relu(hidden)
        elif self.activation == "gelu":
            hidden = F.gelu(hidden)
        else:
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        return self.contract(hidden)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): the pre-norm block."""

    def __init__(self, width: int, heads: int, activation: Activation, rotary: bool, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, rotary, dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Stack(nn.Module):
    """Blocks and the final norm that a pre-norm stack ends with."""

    def __init__(self, config: StackConfig, activation: Activation, rotary: bool, dropout: float) -> None:
        super().__init__()
        self.width = config.width
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, activation, rotary, dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, caches: list[LayerCache] | None = None) -> Tensor:
        """(rows, length, width) to the same; with caches (one a block), as `Attention.forward`."""
        for index, block in enumerate(self.blocks):
            x = block(x, caches[index] if caches is not None else None)
        return self.norm(x)

    def empty_caches(self) -> list[LayerCache]:
        return [LayerCache() for _ in self.blocks]

    def flops(self, length: int) -> int:
        """Of the matrix products over one row of `length` positions: 2 a weight and position, and attention."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        attention = len(self.blocks) * 4 * length * length * self.width
        return 2 * length * weights + attention


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Attention of (rows, heads, queries, d) over as many keys, causal, or of one last query over all keys."""
    queries, keys = q.shape[2], k.shape[2]
    if queries not in (1, keys):
        raise ValueError(f"{queries} queries over {keys} keys: neither one query nor as many as keys")
    causal = queries > 1
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys <= EXPLICIT_ATTENTION_LENGTH
    refused = q.device.type == "cuda" and q.shape[0] >= LARGEST_FUSED_BATCH
    if slow or refused:
        return _explicit_attention(q, k, v, causal, dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        length = q.shape[2]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return F.dropout(scores.softmax(-1), dropout) @ v


def rotate(x: Tensor, first_position: int) -> Tensor:
    """Rotary positions on (rows, heads, length, d), pairs of channels (i, i + d/2), base 10,000, angles in fp32."""
    length, channels = x.shape[-2:]
    half = channels // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    positions = torch.arange(first_position, first_position + length, device=x.device, dtype=torch.float32)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :]], -1)
