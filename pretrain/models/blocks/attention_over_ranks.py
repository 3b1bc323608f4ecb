"""Causal attention of rows that are cut over ranks; see pretrain/distributed/context.py.

no mask, no dropout      keys and values travel around the ranks (ring_attention.py)
mask or dropout          each rank gathers the keys and values of all
window                   each rank gets the last window of the rank before
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed.context import Context, dropout_factors
from pretrain.models.blocks.attention import CausalMask, attention, band, explicit_attention
from pretrain.models.blocks.ring_attention import ring_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def attention_over_ranks(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, context: Context, visible: "Tensor | BlockMask | None" = None
) -> Tensor:
    """Return causal attention over the keys of all ranks.

    Args:
        q: (rows, heads, n, d), of this rank's positions.
        k: as q.
        v: as q.
        dropout: share of attention weights that is dropped.
        context: this rank's part of the rows; its positions are a dimension.
        visible: mask of this rank's queries over the keys of all ranks, as `attention` takes it. None: all before.

    Returns:
        (rows, heads, n, d)
    """
    if visible is None and not dropout:
        return ring_attention(q, k, v, context)
    k, v = context.gather(torch.stack([k, v]), 3)
    if visible is not None:
        return attention(q, k, v, visible, dropout, context)
    first = torch.full((len(q),), context.first(q.shape[2]), device=q.device)
    return attention(q, k, v, CausalMask(first), dropout, context)


def window_attention_over_ranks(
    q: Tensor, k: Tensor, v: Tensor, window: int, dropout: float, context: Context, visible: Tensor | None = None
) -> Tensor:
    """Return what `window_attention` returns for whole rows, at this rank's positions.

    Args:
        q: (rows, heads, n, d), of this rank's positions; the window divides n.
        k: as q.
        v: as q.
        window: positions that a position sees.
        dropout: share of attention weights that is dropped.
        context: this rank's part of the rows; its positions are a dimension.
        visible: narrower mask: (rows, n / window, window, 2 window), as `window_attention` takes it.

    Returns:
        (rows, heads, n, d)
    """
    rows, length = q.shape[0], q.shape[2]
    q, k, v = (x.unflatten(2, (-1, window)).transpose(1, 2) for x in (q, k, v))
    halo_k, halo_v = context.halo(torch.stack([k[:, -1:], v[:, -1:]]))
    factors = _window_factors(q, window, dropout, context) if dropout else None

    def attend(blocks: slice, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Return the attention of some of this rank's blocks, as (rows, blocks, heads, window, d)."""
        some_q, some_k, some_v = (x[:, blocks].flatten(0, 1) for x in (q, k, v))
        if factors is None:
            mixed = attention(some_q, some_k, some_v, seen)
        else:
            own = factors[:, blocks, :, :, -some_k.shape[2] :].flatten(0, 1)
            mixed = explicit_attention(some_q, some_k, some_v, seen, lambda weights: weights * own)
        return mixed.unflatten(0, (rows, -1))

    # Nothing precedes the first block of a row. The first rank's halo is zeros; adding it keeps the halo in the graph,
    # because its backward pass communicates.
    first = slice(0, 1 if context.index == 0 else 0)
    later = slice(first.stop, q.shape[1])
    own_band, mixed = band(window, q.device), []
    if context.index == 0:
        seen = own_band[:, window:] if visible is None else visible[:, 0, None, :, window:]
        mixed.append(attend(first, k[:, first] + halo_k, v[:, first] + halo_v, seen))
    if later.start < later.stop:
        seen = own_band if visible is None else visible[:, later].flatten(0, 1)[:, None]
        k, v = (torch.cat([torch.cat([halo, x[:, :-1]], 1), x], 3) for halo, x in ((halo_k, k), (halo_v, v)))
        mixed.append(attend(later, k, v, seen))
    return torch.cat(mixed, 1).transpose(1, 2).reshape(rows, -1, length, q.shape[-1])


def _window_factors(q: Tensor, window: int, dropout: float, context: Context) -> Tensor:
    """Return the factors by which dropout multiplies the weights of this rank's blocks.

    They are drawn for whole rows as `window_attention` draws them: those of first blocks, then those of others.

    Args:
        q: (rows, blocks, heads, window, d)
        window: positions of a block.
        dropout: share of attention weights that is dropped.
        context: this rank's part of the rows.

    Returns:
        (rows, blocks, heads, window, 2 window)
    """
    rows, blocks, heads = q.shape[:3]
    begin = context.index * blocks - 1
    shape = (rows, blocks * context.size - 1, heads, window, 2 * window)
    first = dropout_factors(q, (rows, 1, heads, window, window), dropout, 1, slice(0, 0 if context.index else 1))
    later = dropout_factors(q, shape, dropout, 1, slice(max(begin, 0), begin + blocks))
    return torch.cat([F.pad(first, (window, 0)), later], 1)
