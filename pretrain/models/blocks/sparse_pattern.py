"""Patterns of the Sparse Transformer (Child et al. 2019, arXiv:1904.10509), and their masks.

A row is cut into blocks of l positions, the stride. Each pattern has a near and a far part:

    strided   near: the last l positions, the own one among them       far: the same column of earlier blocks
    fixed     near: the own block up to the position                   far: c summary columns of earlier blocks

The two parts share no key, so one softmax over both sees each key once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.blocks.documents import BLOCK, block_bounds, ordered_blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Part = Literal["both", "near", "far"]
"""Part of a pattern that a layer sees. far: equation 6's second pattern, and the position itself."""


@dataclass(frozen=True)
class SparsePattern:
    """Keys that a position sees in one layer."""

    kind: Literal["strided", "fixed"]
    """Name of the pattern in the paper."""
    stride: int
    """l: positions of a block."""
    summary: int = 1
    """c: columns of each earlier block that the fixed pattern sees."""
    groups: int = 1
    """Number of sub-blocks of c columns that the heads see in turn. Head h sees sub-block h mod groups, counted from
    the end of the block."""
    part: Part = "both"
    """Part that the layer sees."""

    @property
    def has_near(self) -> bool:
        """Whether near keys are multiplied. The far part of the fixed pattern sees keys of its own block too."""
        return self.part != "far" or self.kind == "fixed"

    @property
    def has_far(self) -> bool:
        """Whether keys of earlier blocks are multiplied by column."""
        return self.part != "near"

    def blocks(self, length: int) -> int:
        """Return the number of blocks of a row; the last one may be short."""
        return -(-length // self.stride)

    def pairs(self, length: int) -> int:
        """Return the pairs of a query and a key that are multiplied over one row of whole blocks, masked or not."""
        blocks, near, far = self.blocks(length), 0, 0
        if self.has_near:
            near = 2 * self.stride if self.kind == "strided" else self.stride
        if self.has_far:
            far = blocks if self.kind == "strided" else blocks * self.summary
        return blocks * self.stride * (near + far)

    def cut(self, x: Tensor) -> Tensor:
        """Cut (rows, heads, length, d) into (rows, heads, blocks, l, d); zeros fill the last block."""
        return F.pad(x, (0, 0, 0, -x.shape[2] % self.stride)).unflatten(2, (-1, self.stride))

    def with_block_before(self, x: Tensor) -> Tensor:
        """Put each block of (rows, heads, blocks, l, d) behind the one before it; zeros precede the first."""
        return torch.cat([F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x], 3)

    def summaries(self, x: Tensor) -> Tensor:
        """Return the summary columns of each head: (rows, heads, blocks, l, d) to (rows, heads, blocks · c, d)."""
        ends = (self.stride - group * self.summary for group in range(self.groups))
        parts = [x[:, group :: self.groups, :, end - self.summary : end] for group, end in enumerate(ends)]
        return (parts[0] if self.groups == 1 else torch.stack(parts, 2).flatten(1, 2)).flatten(2, 3)

    def is_summary(self, group: Tensor, place: Tensor) -> Tensor:
        """Return whether positions are in the summary columns of groups of heads."""
        end = self.stride - group * self.summary
        column = place % self.stride
        return (column >= end - self.summary) & (column < end)


@dataclass(frozen=True)
class Masks:
    """Masks of one pattern over whole rows."""

    near: "Tensor | BlockMask | None"
    """(1 or rows, 1 or groups, blocks, l, keys) booleans over the keys of `SparsePattern.cut`; or blocks for
    FlexAttention over (length, length). None: the pattern has no near keys."""
    far: "Tensor | BlockMask | None"
    """(1 or rows, 1 or groups, blocks, 1 or l, keys) booleans. Or blocks: over positions ordered by column, then block
    (strided), or of all positions over summaries (fixed). None: the pattern has no far keys."""


SparseMasks = Mapping[Part, Masks]
"""Masks of the layers by the part that they see."""


def layer_patterns(pattern: SparsePattern, *, interleaved: bool) -> list[SparsePattern]:
    """Return the patterns that the layers of a model have in turn: merged (equation 7) or interleaved (equation 6)."""
    return [replace(pattern, part=part) for part in ("near", "far")] if interleaved else [pattern]


def sparse_masks(
    patterns: Iterable[SparsePattern], length: int, documents: Tensor | None, device: torch.device, *, in_blocks: bool
) -> SparseMasks:
    """Return the masks of patterns over whole rows.

    Args:
        patterns: patterns of the layers.
        length: positions of a row.
        documents: (rows, length) document of each position, which sees no other; None if it sees all.
        device: device of the masks.
        in_blocks: return masks for FlexAttention; see `takes_blocks`.
    """
    make = _block_masks if in_blocks else _dense_masks
    return {pattern.part: make(pattern, length, documents, device) for pattern in patterns}


def _dense_masks(pattern: SparsePattern, length: int, documents: Tensor | None, device: torch.device) -> Masks:
    blocks, stride = pattern.blocks(length), pattern.stride
    places = torch.arange(blocks * stride, device=device).view(blocks, stride)
    own = None if documents is None else _blocks_of(documents, pattern)
    near = _dense_near(pattern, places, own) if pattern.has_near else None
    far = None
    if pattern.has_far:
        block = torch.arange(blocks, device=device)
        queries = block[:, None, None]
        if pattern.kind == "strided":
            far = (block <= queries if pattern.part == "far" else block < queries)[None, None]
            if own is not None:
                far = far & (own[..., None] == own.transpose(2, 3)[:, :, None])
        else:
            far = (block.repeat_interleave(pattern.summary) < queries)[None, None]
            if own is not None:
                far = far & (own[..., None] == _summary_documents(pattern, own)[:, :, None, None])
    return Masks(near, far)


def _dense_near(pattern: SparsePattern, places: Tensor, own: Tensor | None) -> Tensor:
    """Return the near mask.

    Args:
        pattern: the pattern.
        places: (blocks, l) positions.
        own: (rows, 1, blocks, l) documents, or None.
    """
    queries = places[..., None]
    if pattern.kind == "strided":
        keys = torch.cat([places - pattern.stride, places], 1)[:, None]
        near = ((keys >= 0) & (keys <= queries) & (keys > queries - pattern.stride))[None, None]
        if own is not None:
            before = F.pad(own[:, :, :-1], (0, 0, 1, 0), value=-2)
            near = near & (own[..., None] == torch.cat([before, own], 3)[:, :, :, None])
        return near
    keys = places[:, None]
    near = (keys <= queries)[None, None]
    if pattern.part == "far":
        groups = torch.arange(pattern.groups, device=places.device)[:, None, None, None]
        near = near & (pattern.is_summary(groups, keys) | (keys == queries))
    return near if own is None else near & (own[..., None] == own[:, :, :, None])


def _blocks_of(documents: Tensor, pattern: SparsePattern) -> Tensor:
    """Cut (rows, length) documents into (rows, 1, blocks, l). No position is in the document of the padding."""
    padded = F.pad(documents, (0, -documents.shape[1] % pattern.stride), value=-1)
    return padded.unflatten(1, (-1, pattern.stride))[:, None]


def _summary_documents(pattern: SparsePattern, own: Tensor) -> Tensor:
    """Map (rows, 1, blocks, l) documents to the (rows, groups, blocks · c) documents of the summaries."""
    return pattern.summaries(own[..., None].expand(-1, pattern.groups, -1, -1, -1))[..., 0]


Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Function of row, head, query and key that returns whether the query sees the key."""


def _block_masks(pattern: SparsePattern, length: int, documents: Tensor | None, device: torch.device) -> Masks:
    near = _near_blocks(pattern, length, documents, device) if pattern.has_near else None
    if not pattern.has_far:
        return Masks(near, None)
    far = _column_blocks if pattern.kind == "strided" else _summary_blocks
    return Masks(near, far(pattern, length, documents, device))


def _near_blocks(pattern: SparsePattern, length: int, documents: Tensor | None, device: torch.device) -> "BlockMask":
    stride, is_strided, is_far = pattern.stride, pattern.kind == "strided", pattern.part == "far"

    def first(query: Tensor) -> Tensor:
        return query - stride + 1 if is_strided else query - query % stride

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (key >= first(query))
        if is_far:
            seen = seen & (pattern.is_summary(head % pattern.groups, key) | (key == query))
        return seen if documents is None else seen & (documents[row, query] == documents[row, key])

    begins, ends = block_bounds(length, device)
    some = (begins <= ends[:, None]) & (ends >= first(begins)[:, None])
    return _as_blocks(some, visible, length, length)


def _column_blocks(pattern: SparsePattern, length: int, documents: Tensor | None, device: torch.device) -> "BlockMask":
    """Return the mask of the strided far part in the order of columns, where the keys of a query are neighbours."""
    blocks, sees_itself = pattern.blocks(length), pattern.part == "far"
    order = None if documents is None else _blocks_of(documents, pattern)[:, 0].transpose(1, 2).flatten(1)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = ((key <= query) if sees_itself else (key < query)) & (key >= query - query % blocks)
        return seen if order is None else seen & (order[row, query] == order[row, key])

    begins, ends = block_bounds(blocks * pattern.stride, device)
    last = ends if sees_itself else ends - 1
    some = (begins <= last[:, None]) & (ends >= (begins - begins % blocks)[:, None])
    return _as_blocks(some, visible, blocks * pattern.stride, blocks * pattern.stride)


def _summary_blocks(pattern: SparsePattern, length: int, documents: Tensor | None, device: torch.device) -> "BlockMask":
    """Return the mask of all positions over the summaries of all blocks."""
    stride, summary, blocks = pattern.stride, pattern.summary, pattern.blocks(length)
    of_keys = None if documents is None else _summary_documents(pattern, _blocks_of(documents, pattern))

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key // summary < query // stride
        if documents is None or of_keys is None:
            return seen
        return seen & (of_keys[row, head % pattern.groups, key] == documents[row, query])

    _, last_queries = block_bounds(length, device)
    first_keys, _ = block_bounds(blocks * summary, device)
    some = first_keys // summary < (last_queries // stride)[:, None]
    return _as_blocks(some, visible, length, blocks * summary)


def _as_blocks(some: Tensor, visible: Visible, queries: int, keys: int) -> "BlockMask":
    """Return a mask from the (Q blocks, K blocks) booleans of the blocks that may hold a visible pair."""
    from torch.nn.attention.flex_attention import BlockMask  # noqa: PLC0415 for CUDA only

    return BlockMask.from_kv_blocks(
        *ordered_blocks(some[None]), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(queries, keys)
    )
