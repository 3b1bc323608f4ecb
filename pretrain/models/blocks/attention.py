"""Attention as functions of queries, keys and values, and the choice of the kernel that computes it.

On a CPU in bf16, short attention is two products and a softmax, and long causal attention is a kernel for AMX. All
other attention is torch's fused kernel, except where CUDA refuses the shape.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.kernels import amx_attention

EXPLICIT_ATTENTION_LENGTH = 256
"""Number of keys up to which bf16 attention on a CPU is two products and a softmax, unless amx_attention takes it.

The backward pass of torch's fused kernel took 2.3 times as long at 8 keys and 1.5 times as long at 256. At 1,024 keys
it took a third (torch 2.13, 2 cores, AMX)."""

LARGEST_FUSED_BATCH = 65_536
"""First dimension from which CUDA's fused kernels refuse a tensor (pytorch issue 142228). A model of patches exceeds it
where the patches of all rows form this dimension."""


@dataclass(frozen=True)
class CausalMask:
    """Mask in which query i of a row sees the keys up to first + i, its own key among them."""

    first: Tensor
    """(rows,) place of each row's first query among the keys."""

    def booleans(self, queries: int, keys: int) -> Tensor:
        """Return the mask as (rows, 1, queries, keys) booleans, true where a query sees a key."""
        last = self.first[:, None] + torch.arange(queries, device=self.first.device)
        return torch.arange(keys, device=last.device) <= last[:, None, :, None]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Return causal attention over as many keys as queries, or attention of one last query over all keys.

    Args:
        q: (rows, heads, queries, d)
        k: (rows, heads, keys, d)
        v: (rows, heads, keys, d)
        dropout: share of attention weights that is dropped.

    Returns:
        (rows, heads, queries, d)

    Raises:
        ValueError: there are neither one query nor as many queries as keys.
    """
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


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | CausalMask | None, dropout: float = 0.0) -> Tensor:
    """Return attention over any number of keys, with any mask.

    Args:
        q: (rows, heads, queries, d)
        k: (rows, heads, keys, d)
        v: (rows, heads, keys, d)
        visible: keys that each query sees; at least one. A tensor expands to (rows, heads, queries, keys). Its values
            are booleans, true where a query sees a key, or numbers that are added to the scores. None: all keys.
        dropout: share of attention weights that is dropped.

    Returns:
        (rows, heads, queries, d)
    """
    if isinstance(visible, CausalMask):
        if amx_attention.takes(q, k):
            return amx_attention.causal_attention(q, k, v, visible.first, dropout)
        visible = visible.booleans(q.shape[2], k.shape[2])
    if _fused_is_right(q, k):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
    return _explicit_attention(q, k, v, visible, dropout)


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float) -> Tensor:
    """Return causal attention in which a position sees itself and the window - 1 positions before it.

    The sequence is cut into blocks of one window. Each block attends to itself and to the block before it. The cost
    grows with length x window, and this needs no kernel of its own.

    Args:
        q: (rows, heads, length, d)
        k: (rows, heads, length, d); if q is one query, up to `window` keys.
        v: as k.
        window: positions that a position sees.
        dropout: share of attention weights that is dropped.

    Returns:
        (rows, heads, length, d)
    """
    rows, length = q.shape[0], q.shape[2]
    if length <= window:
        return causal_attention(q, k, v, dropout)
    blocks = -(-length // window)

    def cut(x: Tensor) -> Tensor:
        """Cut into (rows, blocks, heads, window, d). No position sees the padding at the end of the last block."""
        return F.pad(x, (0, 0, 0, blocks * window - length)).unflatten(2, (blocks, window)).transpose(1, 2)

    q, k, v = cut(q), cut(k), cut(v)
    first = causal_attention(q[:, 0], k[:, 0], v[:, 0], dropout)
    k, v = (torch.cat([x[:, :-1], x[:, 1:]], 3).flatten(0, 1) for x in (k, v))
    later = attention(q[:, 1:].flatten(0, 1), k, v, _band(window, q.device), dropout)
    mixed = torch.cat([first[:, None], later.unflatten(0, (rows, blocks - 1))], 1)
    return mixed.transpose(1, 2).flatten(2, 3)[:, :, :length]


def window_pairs(length: int, window: int | None) -> int:
    """Return the pairs of a query and a key that `window_attention` multiplies over one row; None means no window."""
    if window is None or length <= window:
        return length * length
    return window * window * (2 * -(-length // window) - 1)


def describe_attention(device: torch.device, dtype: torch.dtype) -> str:
    """Return which kernels `causal_attention` and `attention` choose on a device in a precision."""
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


def _band(window: int, device: torch.device) -> Tensor:
    """Return the (window, 2 window) mask of a block's positions over the block before it and itself."""
    age = torch.arange(window, 2 * window, device=device)[:, None] - torch.arange(2 * window, device=device)
    return (age >= 0) & (age < window)


def _fused_is_right(q: Tensor, k: Tensor) -> bool:
    """Return whether torch's fused kernel is the fastest here, and takes this shape."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= EXPLICIT_ATTENTION_LENGTH
    refused = q.device.type == "cuda" and q.shape[0] >= LARGEST_FUSED_BATCH
    return not (slow or refused)


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float) -> Tensor:
    """Return attention as two products and a softmax."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if visible is not None:
        seen = visible.dtype == torch.bool
        scores = scores.masked_fill(~visible, float("-inf")) if seen else scores + visible
    return F.dropout(scores.softmax(-1), dropout) @ v
