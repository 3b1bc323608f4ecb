"""Documents of positions, and masks that keep attention within a document.

Position t reads the id before t and predicts id t. A separator is the last id of its document, so the position that
reads a separator is the first one of the next document:

    ids          a    b    |    c    d
    reads      start  a    b    |    c
    document     0    0    0    1    1
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.vocabulary import SEPARATOR
from pretrain.models.blocks.attention import CausalMask, band

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Queries and keys of one block of FlexAttention's masks."""


def documents_of(read: Tensor) -> Tensor:
    """Map (rows, n) ids to the documents of the positions that read them, counted from 0 in each row."""
    return (read == SEPARATOR).cumsum(1)


def visible_in_documents(queries: Tensor, keys: Tensor, first: Tensor, *, in_blocks: bool) -> "Tensor | BlockMask":
    """Return the mask in which a query sees the keys of its document up to its own place.

    Args:
        queries: (rows, Q) document of each query, rising.
        keys: (rows, K) document of each key, rising.
        first: (rows,) place of each row's first query among the keys.
        in_blocks: return a mask for FlexAttention; see `takes_blocks`.

    Returns:
        (rows, 1, Q, K) booleans, or the same as blocks.
    """
    if in_blocks:
        return _block_mask(queries, keys, first)
    past = CausalMask(first).booleans(queries.shape[1], keys.shape[1])
    return past & (queries[:, None, :, None] == keys[:, None, None])


def visible_in_prefix(lengths: Tensor, positions: int) -> Tensor:
    """Return the mask in which positions see those before them, and the positions of a prefix see each other.

    Position t predicts id t. Position n, where n is the length of the prefix, reads the last id of the prefix.

    Args:
        lengths: (rows,) ids of each prefix.
        positions: number of positions of a row.

    Returns:
        (rows, 1, positions, positions) booleans.
    """
    places = torch.arange(positions, device=lengths.device)
    return (places <= places[:, None]) | (places <= lengths[:, None, None, None])


def visible_in_window(documents: Tensor, window: int) -> Tensor:
    """Return the mask of `window_attention` in which a position sees only its document.

    Args:
        documents: (rows, n) document of each position, with n > window.
        window: positions that a position sees, its own among them.

    Returns:
        (rows, n / window, window, 2 window) booleans: the positions of each block over the block before it and itself.
        Padding fills the last block.
    """
    own = F.pad(documents, (0, -documents.shape[1] % window), value=-1).unflatten(1, (-1, window))
    before = F.pad(own[:, :-1], (0, 0, 1, 0), value=-2)
    return band(window, own.device) & (own[..., None] == torch.cat([before, own], 2)[:, :, None])


def visible_in_patches(documents: Tensor, patch: int, reach: int, *, across_documents: bool) -> "BlockMask":
    """Return the mask in which positions of whole rows see their patch, and the end of the previous one.

    Args:
        documents: (rows, length) document of each position.
        patch: positions of a patch.
        reach: last positions of the previous patch that are seen, if they are of the same document.
        across_documents: whether a position sees other documents of its patch.
    """
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415 for CUDA only

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        first = query - query % patch
        near = (key <= query) & (key >= first - reach)
        alike = documents[row, query] == documents[row, key]
        return near & (alike | (key >= first)) if across_documents else near & alike

    begins, ends = block_bounds(documents.shape[1], documents.device)
    reached = begins - begins % patch - reach
    some = (ends >= reached[:, None]) & (begins <= ends[:, None])
    return BlockMask.from_kv_blocks(
        *ordered_blocks(some[None]), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(documents.shape[1],) * 2
    )


def _block_mask(queries: Tensor, keys: Tensor, first: Tensor) -> "BlockMask":
    """Return the mask of `visible_in_documents` as blocks, without a (Q, K) tensor.

    Documents rise along a row, so the first and the last position of a block bound all of its documents.
    """
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415 for CUDA only

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (queries[row, query] == keys[row, key]) & (key <= first[row] + query)

    begins_q, ends_q = block_bounds(queries.shape[1], queries.device)
    begins_k, ends_k = block_bounds(keys.shape[1], keys.device)
    first_q, last_q = queries[:, begins_q, None], queries[:, ends_q, None]
    first_k, last_k = keys[:, None, begins_k], keys[:, None, ends_k]
    place_q, place_k = first[:, None, None] + begins_q[:, None], begins_k
    some = (first_k <= last_q) & (first_q <= last_k) & (place_k <= first[:, None, None] + ends_q[:, None])
    whole = (ends_q - begins_q == BLOCK - 1)[:, None] & (ends_k - begins_k == BLOCK - 1)
    every = whole & (first_k == last_q) & (first_q == last_k) & (ends_k <= place_q)
    return BlockMask.from_kv_blocks(
        *ordered_blocks(some & ~every),
        *ordered_blocks(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(queries.shape[1], keys.shape[1]),
    )


def block_bounds(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first and the last position of each block."""
    begins = torch.arange(0, length, BLOCK, device=device)
    return begins, (begins + BLOCK - 1).clamp(max=length - 1)


def ordered_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Map (rows, Q blocks, K blocks) booleans to the number of true blocks of each row and their order, true first."""
    blocks = blocks[:, None].int()
    return blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()
