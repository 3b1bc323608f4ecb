"""Attention as functions of queries, keys and values, and the choice of the kernel that computes it.

On a CPU in bf16, short attention is two products and a softmax, and long causal attention is a kernel for AMX. On
CUDA, attention within documents and from latents to all inputs is FlexAttention. All other attention is torch's fused
kernel, except where CUDA refuses the shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed.context import WHOLE_ROWS, Context
from pretrain.kernels import amx_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

EXPLICIT_ATTENTION_LENGTH = 256
"""Number of keys up to which bf16 attention on a CPU is two products and a softmax, unless amx_attention takes it.

The backward pass of torch's fused kernel took 2.3 times as long at 8 keys and 1.5 times as long at 256. At 1,024 keys
it took a third (torch 2.13, 2 cores, AMX)."""

LARGEST_FUSED_BATCH = 65_535
"""Largest first dimension that CUDA's fused kernels take (pytorch issue 142228). A larger one is cut. A model of
patches exceeds it where the patches of all rows form this dimension."""

FEWEST_BLOCK_KEYS = 256
"""Smallest number of keys at which attention within documents uses FlexAttention on CUDA. Smaller masks are cheap."""

LARGEST_PACKED_REACH = 32
"""Largest number of keys of a position in a patch and before it, for which CUDA packs the patches of a row.

Let a patch and what it sees before have 16 keys. A fused kernel multiplies a tile of 64 by 64 for each patch of 8, so
512 pairs for each position. FlexAttention multiplies two tiles of 128 by 128 for 128 positions, so 256 pairs; one tile
if no position sees the previous patch. It reads keys in place: copies of the keys and values of previous patches
double the bytes that attention moves. From 32 keys on the fused kernel multiplies less."""

FEWEST_PACKED, MOST_PACKED = 1024, 65_536
"""Bytes of a row whose patches are packed: enough for eight tiles, and few enough for a mask of 512 by 512 tiles."""

FEWEST_BLOCK_CHANNELS = 16
"""Channels of a head from which FlexAttention takes it."""


@dataclass(frozen=True)
class CausalMask:
    """Mask in which query i of a row sees the keys up to first + i, its own key among them."""

    first: Tensor
    """(rows,) place of each row's first query among the keys."""

    def booleans(self, queries: int, keys: int) -> Tensor:
        """Return the mask as (rows, 1, queries, keys) booleans, true where a query sees a key."""
        last = self.first[:, None] + torch.arange(queries, device=self.first.device)
        return torch.arange(keys, device=last.device) <= last[:, None, :, None]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, context: Context = WHOLE_ROWS) -> Tensor:
    """Return causal attention over as many keys as queries, or attention of one last query over all keys.

    Args:
        q: (rows, heads, queries, d)
        k: (rows, heads, keys, d)
        v: (rows, heads, keys, d)
        dropout: share of attention weights that is dropped.
        context: part of the rows that the queries are.

    Returns:
        (rows, heads, queries, d)

    Raises:
        ValueError: there are neither one query nor as many queries as keys.
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries not in (1, keys):
        raise ValueError(f"{queries} queries over {keys} keys: neither one query nor as many as keys")
    if queries == 1:
        return attention(q, k, v, None, dropout, context)
    if not (context.size > 1 and dropout):  # a fused kernel cannot draw a part of the whole rows' mask
        if amx_attention.takes(q, k):
            return amx_attention.causal_attention(q, k, v, q.new_zeros(q.shape[0], dtype=torch.long), dropout)
        if _fused_is_right(q, k):
            return _fused_attention(q, k, v, None, dropout, is_causal=True)
    past = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    return explicit_attention(q, k, v, past, partial(context.dropout, share=dropout, dim=2))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: "Tensor | CausalMask | BlockMask | None",
    dropout: float = 0.0,
    context: Context = WHOLE_ROWS,
) -> Tensor:
    """Return attention over any number of keys, with any mask.

    Args:
        q: (rows, heads, queries, d)
        k: (rows, heads, keys, d)
        v: (rows, heads, keys, d)
        visible: keys that each query sees; at least one. A tensor expands to (rows, heads, queries, keys). Its values
            are booleans, true where a query sees a key, or numbers that are added to the scores. Blocks are for
            FlexAttention; see `takes_blocks`. None: all keys.
        dropout: share of attention weights that is dropped.
        context: part of the rows that the queries are.

    Returns:
        (rows, heads, queries, d)
    """
    draws_in_part = context.size > 1 and dropout > 0
    if isinstance(visible, CausalMask):
        if amx_attention.takes(q, k) and not draws_in_part:
            return amx_attention.causal_attention(q, k, v, visible.first, dropout)
        visible = visible.booleans(q.shape[2], k.shape[2])
    if visible is not None and not isinstance(visible, Tensor):
        return _block_attention(q, k, v, visible)
    if _fused_is_right(q, k) and not draws_in_part:
        return _fused_attention(q, k, v, visible, dropout)
    return explicit_attention(q, k, v, visible, partial(context.dropout, share=dropout, dim=2))


def takes_blocks(x: Tensor, channels: int, keys: int, dropout: float) -> bool:
    """Return whether a mask by documents or by latents is a block mask of FlexAttention; otherwise it is boolean.

    FlexAttention has no dropout. The meta device counts as CUDA, whose memory is estimated on it.

    Args:
        x: any tensor of the model's device and precision.
        channels: channels of a head.
        keys: number of keys.
        dropout: share of attention weights that is dropped.
    """
    is_fused = x.device.type in ("cuda", "meta") and x.dtype != torch.float64 and channels >= FEWEST_BLOCK_CHANNELS
    return is_fused and keys >= FEWEST_BLOCK_KEYS and not dropout


def packs_patches(x: Tensor, channels: int, length: int, reach: int, dropout: float) -> bool:
    """Return whether attention within patches is one FlexAttention over a row; otherwise it is one for each patch.

    Args:
        x: any tensor of the model's device and precision.
        channels: channels of a head.
        length: bytes of a row.
        reach: keys of a position in its patch and before it.
        dropout: share of attention weights that is dropped.
    """
    fits = reach <= LARGEST_PACKED_REACH and FEWEST_PACKED <= length <= MOST_PACKED
    return fits and takes_blocks(x, channels, length, dropout)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float, visible: "Tensor | BlockMask | None" = None
) -> Tensor:
    """Return causal attention in which a position sees itself and the window - 1 positions before it.

    The sequence is cut into blocks of one window. Each block attends to itself and to the block before it. The cost
    grows with length x window, and this needs no kernel of its own.

    Args:
        q: (rows, heads, length, d)
        k: (rows, heads, length, d); if q is one query, up to `window` keys.
        v: as k.
        window: positions that a position sees.
        dropout: share of attention weights that is dropped.
        visible: narrower mask: (rows, blocks, window, 2 window) booleans over the block before and the own one. If
            length is at most `window`, a mask that `attention` takes. None: the whole window.

    Returns:
        (rows, heads, length, d)
    """
    rows, length = q.shape[0], q.shape[2]
    if length <= window:
        return causal_attention(q, k, v, dropout) if visible is None else attention(q, k, v, visible, dropout)
    blocks = -(-length // window)

    def cut(x: Tensor) -> Tensor:
        """Cut into (rows, blocks, heads, window, d). No position sees the padding at the end of the last block."""
        return F.pad(x, (0, 0, 0, blocks * window - length)).unflatten(2, (blocks, window)).transpose(1, 2)

    q, k, v = cut(q), cut(k), cut(v)
    if visible is None:
        first = causal_attention(q[:, 0], k[:, 0], v[:, 0], dropout)
        of_later = band(window, q.device)
    else:
        assert isinstance(visible, Tensor)
        first = attention(q[:, 0], k[:, 0], v[:, 0], visible[:, :1, :, window:], dropout)
        of_later = visible[:, 1:].flatten(0, 1)[:, None]
    k, v = (torch.cat([x[:, :-1], x[:, 1:]], 3).flatten(0, 1) for x in (k, v))
    later = attention(q[:, 1:].flatten(0, 1), k, v, of_later, dropout)
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
            f"torch's fused kernel, for {LARGEST_FUSED_BATCH:,} rows or patches at a time; FlexAttention within "
            "documents and from latents to inputs, without dropout"
        )
    return "torch's fused kernel"


def band(window: int, device: torch.device) -> Tensor:
    """Return the (window, 2 window) mask of a block's positions over the block before it and itself."""
    age = torch.arange(window, 2 * window, device=device)[:, None] - torch.arange(2 * window, device=device)
    return (age >= 0) & (age < window)


def visible_after(kept: int, count: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the mask of positions after cached ones; None where `causal_attention` and `window_attention` need none.

    Args:
        kept: cached positions that are kept.
        count: positions that follow them; at most `window` if any are kept.
        window: positions that a position sees, its own and those right before it; None: all.
        device: of the mask.

    Returns:
        (count, kept + count) booleans, true where a position sees another.
    """
    if count == 1 or not kept:
        return None
    age = torch.arange(kept, kept + count, device=device)[:, None] - torch.arange(kept + count, device=device)
    return age >= 0 if window is None else (age >= 0) & (age < window)


def _fused_is_right(q: Tensor, k: Tensor) -> bool:
    """Return whether torch's fused kernel is the fastest here."""
    return not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= EXPLICIT_ATTENTION_LENGTH)


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float, *, is_causal: bool = False
) -> Tensor:
    """Return attention by torch's fused kernel, for at most `LARGEST_FUSED_BATCH` rows at a time."""

    def mix(part: slice) -> Tensor:
        own = visible[part] if visible is not None and visible.dim() == 4 and len(visible) == len(q) else visible
        mixed: Tensor = F.scaled_dot_product_attention(
            q[part], k[part], v[part], attn_mask=own, dropout_p=dropout, is_causal=is_causal
        )
        return mixed

    if len(q) <= LARGEST_FUSED_BATCH:
        return mix(slice(None))
    return torch.cat([mix(slice(i, i + LARGEST_FUSED_BATCH)) for i in range(0, len(q), LARGEST_FUSED_BATCH)])


def _block_attention(q: Tensor, k: Tensor, v: Tensor, blocks: "BlockMask") -> Tensor:
    """Return attention by FlexAttention."""
    if q.is_meta:  # has no FlexAttention; this keeps the same tensors
        return F.scaled_dot_product_attention(q, k, v)
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415 for CUDA only

    # Without compilation it makes all scores. In a compiled block it is compiled with the block.
    kernel = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
    mixed: Tensor = kernel(q, k, v, block_mask=blocks)
    return mixed


def normalized_block_attention(q: Tensor, k: Tensor, v: Tensor, blocks: "BlockMask") -> tuple[Tensor, Tensor]:
    """Return attention by FlexAttention, and the logarithm of the normalizer of each query.

    Attention of a query that sees no key is 0, and its logarithm is -infinity.

    Args:
        q: (rows, heads, queries, d)
        k: (rows, heads, keys, d)
        v: as k.
        blocks: keys that each query sees.

    Returns:
        (rows, heads, queries, d), and (rows, heads, queries) fp32.
    """
    if q.is_meta:
        return F.scaled_dot_product_attention(q, k, v), q.new_empty(q.shape[:3], dtype=torch.float32)
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention  # noqa: PLC0415 for CUDA only

    kernel = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
    mixed, aux = kernel(q, k, v, block_mask=blocks, return_aux=AuxRequest(lse=True))
    return mixed, aux.lse


_compiled: Callable[..., Any] = cache(torch.compile)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, drop: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return attention as two products and a softmax; `drop` drops some of its weights."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if visible is not None:
        seen = visible.dtype == torch.bool
        scores = scores.masked_fill(~visible, float("-inf")) if seen else scores + visible
    return drop(scores.softmax(-1)) @ v
