"""Attention layers of the Sparse Transformer (Child et al. 2019, arXiv:1904.10509).

    no cache, CPU or dropout    products of blocks: near scores and far scores side by side, and one softmax
    no cache, CUDA              FlexAttention of the near and of the far part, merged by their normalizers
    cache                       one query over the keys that it sees

`sparse_pattern.py` defines what a position sees.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.blocks.attention import attention, normalized_block_attention
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.multi_head import MultiHead
from pretrain.models.blocks.positions import Rotary, rotate_alike
from pretrain.models.blocks.sparse_pattern import Masks, SparseMasks, SparsePattern


class SparseAttention(MultiHead):
    """Causal multi-head self-attention in which a position sees the keys of a pattern."""

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        pattern: SparsePattern,
        rotary: Rotary | None = None,
        bias: bool = False,
    ) -> None:
        """Build the layer.

        Args:
            width: channels of the input and of the output.
            heads: attention heads; they divide the width, and the pattern's groups divide them.
            dropout: share of attention weights that is dropped in training.
            pattern: keys that a position sees.
            rotary: rotary positions; None means none.
            bias: whether the linear maps have biases.
        """
        super().__init__(width, heads, dropout, bias)
        self.pattern, self.rotary = pattern, rotary

    def forward(
        self, x: Tensor, cache: "SparseCache | None" = None, visible: "SparseMasks | Tensor | None" = None
    ) -> Tensor:
        """Attend to the positions that each position sees.

        Args:
            x: (rows, length, width); with a cache that is not empty, the one position that follows the cached ones.
            cache: keys and values of all earlier positions that later ones see.
            visible: masks of whole rows; of one position, (rows, positions) document of each position up to it, or
                None if it sees all documents.

        Returns:
            (rows, length, width)
        """
        q, k, v = self.project(x)
        first = 0 if cache is None else cache.length
        if self.rotary:
            q, k = rotate_alike((q, k), torch.arange(first, first + x.shape[1], device=x.device), self.rotary)
        if first:
            assert cache is not None
            assert visible is None or isinstance(visible, Tensor)
            return self.merge(attention(q, *cache.append(k, v, visible), self.dropout_now))
        if cache is not None:
            cache.fill(k, v)
        assert visible is not None
        assert not isinstance(visible, Tensor)
        return self.merge(sparse_attention(q, k, v, self.pattern, visible[self.pattern.part], self.dropout_now))


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, pattern: SparsePattern, masks: Masks, dropout: float) -> Tensor:
    """Return causal attention over whole rows in which a position sees the keys of a pattern.

    Args:
        q: (rows, heads, length, d)
        k: as q.
        v: as q.
        pattern: keys that a position sees.
        masks: masks of the pattern; they choose the way of computation.
        dropout: share of attention weights that is dropped; 0 if the masks are blocks for FlexAttention.

    Returns:
        (rows, heads, length, d)
    """
    in_blocks = any(mask is not None and not isinstance(mask, Tensor) for mask in (masks.near, masks.far))
    if in_blocks:
        return _flex_attention(q, k, v, pattern, masks)
    return _explicit_attention(q, k, v, pattern, masks, dropout)


def _explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: SparsePattern, masks: Masks, dropout: float
) -> Tensor:
    """Return attention as products of blocks and one softmax. It keeps `SparsePattern.pairs` scores a head."""
    length, scores = q.shape[2], []
    q, k, v = (pattern.cut(x) for x in (q * q.shape[-1] ** -0.5, k, v))
    if masks.near is not None:
        assert isinstance(masks.near, Tensor)
        scores.append(_hide(q @ _near_keys(pattern, k).transpose(-1, -2), masks.near))
    if masks.far is not None:
        assert isinstance(masks.far, Tensor)
        scores.append(_hide(_far_scores(pattern, q, k), masks.far))
    weights = F.dropout(torch.cat(scores, -1).softmax(-1), dropout)
    near, far = weights.split([scores[0].shape[-1], weights.shape[-1] - scores[0].shape[-1]], -1)
    if masks.near is None:
        return _far_values(pattern, near, v).flatten(2, 3)[:, :, :length]
    mixed = near @ _near_keys(pattern, v)
    if masks.far is not None:
        mixed = mixed + _far_values(pattern, far, v)
    return mixed.flatten(2, 3)[:, :, :length]


def _hide(scores: Tensor, mask: Tensor) -> Tensor:
    """Set the scores of hidden keys to -infinity; the mask has one entry a group of heads."""
    return scores.unflatten(1, (-1, mask.shape[1])).masked_fill(~mask[:, None], float("-inf")).flatten(1, 2)


def _near_keys(pattern: SparsePattern, x: Tensor) -> Tensor:
    """Map (rows, heads, blocks, l, d) keys or values to those that each block multiplies."""
    return pattern.with_block_before(x) if pattern.kind == "strided" else x


def _far_scores(pattern: SparsePattern, q: Tensor, k: Tensor) -> Tensor:
    """Return (rows, heads, blocks, l, keys) products of queries with the keys of their columns, or with summaries."""
    if pattern.kind == "strided":
        return (q.transpose(2, 3) @ k.transpose(2, 3).transpose(-1, -2)).transpose(2, 3)
    return (q.flatten(2, 3) @ pattern.summaries(k).transpose(-1, -2)).unflatten(2, q.shape[2:4])


def _far_values(pattern: SparsePattern, weights: Tensor, v: Tensor) -> Tensor:
    """Return (rows, heads, blocks, l, d) values under the weights of `_far_scores`."""
    if pattern.kind == "strided":
        return (weights.transpose(2, 3) @ v.transpose(2, 3)).transpose(2, 3)
    return (weights.flatten(2, 3) @ pattern.summaries(v)).unflatten(2, weights.shape[2:4])


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, pattern: SparsePattern, masks: Masks) -> Tensor:
    """Return attention by FlexAttention, once for each part, merged as parts of one softmax.

    A position without far keys has normalizer 0, so its far part has weight 0.
    """
    length, parts = q.shape[2], []
    assert not isinstance(masks.near, Tensor)
    assert not isinstance(masks.far, Tensor)
    if masks.near is not None:
        parts.append(normalized_block_attention(q, k, v, masks.near))
    if masks.far is not None and pattern.kind == "strided":
        by_column = [pattern.cut(x).transpose(2, 3).flatten(2, 3) for x in (q, k, v)]
        mixed, log_sum = normalized_block_attention(by_column[0], by_column[1], by_column[2], masks.far)
        blocks = (pattern.stride, pattern.blocks(length))
        mixed, log_sum = (x.unflatten(2, blocks).transpose(2, 3).flatten(2, 3) for x in (mixed, log_sum))
        parts.append((mixed[:, :, :length], log_sum[:, :, :length]))
    elif masks.far is not None:
        keys, values = (pattern.summaries(pattern.cut(x)) for x in (k, v))
        parts.append(normalized_block_attention(q, keys, values, masks.far))
    if len(parts) == 1:
        return parts[0][0]
    (near, near_sum), (far, far_sum) = parts
    total = torch.logaddexp(near_sum, far_sum)
    shares = ((near_sum - total).exp()[..., None], (far_sum - total).exp()[..., None])
    return (near * shares[0] + far * shares[1]).to(q.dtype)


class SparseCache:
    """Keys and values that later positions of one layer see.

    strided           all positions, since every position is in the column of later ones
    strided, near     the last l - 1 positions
    fixed             the current block, and the summaries of earlier blocks
    """

    def __init__(self, pattern: SparsePattern) -> None:
        """Make an empty cache."""
        self.length = 0
        """Positions so far, kept or not."""
        self._pattern = pattern
        is_rolling = pattern.kind == "strided" and pattern.part == "near"
        self._near = LayerCache(pattern.stride - 1 if is_rolling else None)
        self._far = LayerCache()

    @property
    def kept(self) -> int:
        """Number of kept positions; summaries of several groups of heads count once."""
        return self._near.kept + self._far.kept

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Append the first positions, (rows, heads, n, d) keys and values, to an empty cache."""
        self.length = k.shape[2]
        whole = 0 if self._pattern.kind == "strided" else self.length - self.length % self._pattern.stride
        if whole:
            self._append_summaries(k[:, :, :whole], v[:, :, :whole])
        self._near.append(k[:, :, whole:], v[:, :, whole:])

    def append(self, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append one position, and return the keys and values that it sees, and which of them.

        Args:
            k: (rows, heads, 1, d)
            v: as k.
            documents: (rows, length + 1) document of each position up to this one; None if it sees all.

        Returns:
            (rows, heads, n, d) twice, and (1 or rows, 1 or heads, 1, n) booleans or None.
        """
        place, self.length = self.length, self.length + 1
        keys, values = self._near.append(k, v)
        if self._pattern.kind == "strided":
            return self._strided(place, keys, values, documents)
        return self._fixed(place, keys, values, documents)

    def _strided(
        self, place: int, keys: Tensor, values: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        stride, part = self._pattern.stride, self._pattern.part
        if part == "near":
            visible = None if documents is None else documents[:, -keys.shape[2] :] == documents[:, -1:]
        else:
            near = torch.arange(max(place - stride + 1, 0) if part == "both" else place, place + 1, device=keys.device)
            seen = torch.cat([torch.arange(place % stride, place, stride, device=keys.device), near])
            keys, values = keys[:, :, seen], values[:, :, seen]
            visible = None if documents is None else documents[:, seen] == documents[:, -1:]
        return keys, values, None if visible is None else visible[:, None, None]

    def _fixed(
        self, place: int, keys: Tensor, values: Tensor, documents: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        pattern, begin = self._pattern, place - place % self._pattern.stride
        visible = self._visible_in_fixed(place, documents, keys.device)
        seen_keys, seen_values = keys, values
        if pattern.has_far:
            far_keys, far_values = self._far.append(keys[:, :, :0], values[:, :, :0])
            seen_keys, seen_values = torch.cat([far_keys, keys], 2), torch.cat([far_values, values], 2)
        if self.length == begin + pattern.stride:
            if pattern.has_far:
                self._append_summaries(keys, values)
            self._near.clear()
        if visible is not None and visible.shape[1] > 1:
            visible = visible.repeat(1, keys.shape[1] // pattern.groups, 1, 1)
        return seen_keys, seen_values, visible

    def _visible_in_fixed(self, place: int, documents: Tensor | None, device: torch.device) -> Tensor | None:
        """Return the (1 or rows, 1 or groups, 1, n) mask over summaries of earlier blocks and the own block."""
        pattern = self._pattern
        places = torch.arange(place + 1, device=device)
        own = places[place - place % pattern.stride :]
        seen = torch.ones(1, 1, len(own), dtype=torch.bool, device=device)
        if pattern.part == "far":
            groups = torch.arange(pattern.groups, device=device)[:, None]
            seen = (pattern.is_summary(groups, own) | (own == place))[None]
        if documents is not None:
            seen = seen & (documents[:, own] == documents[:, -1:])[:, None]
        elif pattern.part != "far":
            return None
        if not pattern.has_far:
            return seen[:, :, None]
        earlier = (
            places[: len(places) - len(own)].view(1, 1, -1, pattern.stride, 1).expand(-1, pattern.groups, -1, -1, -1)
        )
        summaries = pattern.summaries(earlier)[..., 0]
        if documents is None:
            far = torch.ones_like(summaries, dtype=torch.bool)
        else:
            far = documents[:, summaries[0]] == documents[:, -1:, None]
        rows = max(len(far), len(seen))
        return torch.cat([x.expand(rows, pattern.groups, -1) for x in (far, seen)], 2)[:, :, None]

    def _append_summaries(self, k: Tensor, v: Tensor) -> None:
        if self._pattern.has_far:
            self._far.append(*(self._pattern.summaries(self._pattern.cut(x)) for x in (k, v)))
