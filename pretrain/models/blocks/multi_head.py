"""Multi-head attention layers: the linear maps around attention."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.models.blocks.attention import CausalMask, attention, causal_attention, window_attention
from pretrain.models.blocks.attention_over_ranks import attention_over_ranks, window_attention_over_ranks
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.context import InContext
from pretrain.models.blocks.merged_attention import merged_attention
from pretrain.models.blocks.norms import LayerNorm
from pretrain.models.blocks.positions import Rotary, rotate, rotate_alike

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class MultiHead(InContext):
    """Linear maps around any multi-head self-attention."""

    def __init__(self, width: int, heads: int, dropout: float, bias: bool = False) -> None:
        """Build the maps.

        Args:
            width: channels of the input and of the output.
            heads: attention heads; they divide the width.
            dropout: share of attention weights that is dropped in training.
            bias: whether the maps have biases.
        """
        super().__init__()
        self.heads, self.dropout, self.head_width = heads, dropout, width // heads
        self.query_key_value = nn.Linear(width, 3 * width, bias)
        self.output = nn.Linear(width, width, bias)

    def own_fused_matrices(self) -> dict[str, int]:
        """Return the matrices of queries, keys and values; see `FusesMatrices`."""
        return {"query_key_value.weight": 3}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (rows, length, width) to queries, keys and values, each (rows, heads, length, width / heads)."""
        rows, length, width = x.shape
        qkv = self.query_key_value(x).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, mixed: Tensor) -> Tensor:
        """Map (rows, heads, length, width / heads) to (rows, length, width)."""
        return self.output(mixed.transpose(1, 2).flatten(2))

    @property
    def dropout_now(self) -> float:
        """Share of attention weights that is dropped: 0 outside training."""
        return self.dropout if self.training else 0.0


class Attention(MultiHead):
    """Causal multi-head self-attention. Rotary positions and a sliding window are options.

    With a window of w, a position sees itself and the w - 1 positions before it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        rotary: Rotary | None = None,
        window: int | None = None,
        bias: bool = False,
        norms: bool = False,
    ) -> None:
        """Build the layer.

        Args:
            width: channels of the input and of the output.
            heads: attention heads; they divide the width.
            dropout: share of attention weights that is dropped in training.
            rotary: rotary positions; None means none.
            window: positions that a position sees; None means all before it.
            bias: whether the linear maps have biases.
            norms: whether the queries and the keys of each head have a norm, before rotary positions.
        """
        super().__init__(width, heads, dropout, bias)
        self.rotary, self.window = rotary, window
        self.query_norm = LayerNorm(width // heads) if norms else None
        self.key_norm = LayerNorm(width // heads) if norms else None

    def forward(
        self, x: Tensor, cache: LayerCache | None = None, visible: "Tensor | BlockMask | None" = None
    ) -> Tensor:
        """Attend to the positions before each position, and to those in a cache.

        Args:
            x: (rows, length, width); with a cache, the positions that follow the cached ones.
            cache: an empty cache, or any cache if x is one position long or has a mask. With a window of w, its limit
                is w - 1.
            visible: mask over the cached positions and these, as `attention` takes it; with a window, as
                `window_attention` takes it. None: all positions before, within the window.

        Returns:
            (rows, length, width)
        """
        q, k, v = self.project(x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary:
            first = cache.length if cache is not None else self.context.first(x.shape[1])
            places = torch.arange(first, first + x.shape[1], device=x.device)
            q, k = rotate_alike((q, k), places, self.rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.context.cuts_positions:
            return self.merge(self._attention_over_ranks(q, k, v, visible))
        if self.window is not None:
            return self.merge(window_attention(q, k, v, self.window, self.dropout_now, visible))
        if visible is not None:
            return self.merge(attention(q, k, v, visible, self.dropout_now, self.context))
        return self.merge(causal_attention(q, k, v, self.dropout_now, self.context))

    def _attention_over_ranks(self, q: Tensor, k: Tensor, v: Tensor, visible: "Tensor | BlockMask | None") -> Tensor:
        if self.window is None or self.window >= q.shape[2] * self.context.size:
            return attention_over_ranks(q, k, v, self.dropout_now, self.context, visible)
        assert visible is None or isinstance(visible, Tensor)
        return window_attention_over_ranks(q, k, v, self.window, self.dropout_now, self.context, visible)


class FullAttention(MultiHead):
    """Multi-head self-attention in which each position sees its whole row. Rotary positions are an option."""

    def __init__(
        self, width: int, heads: int, dropout: float, rotary: Rotary | None = None, bias: bool = False
    ) -> None:
        """Build the layer.

        Args:
            width: channels of the input and of the output.
            heads: attention heads; they divide the width.
            dropout: share of attention weights that is dropped in training.
            rotary: rotary positions; None means none.
            bias: whether the linear maps have biases.
        """
        super().__init__(width, heads, dropout, bias)
        self.rotary = rotary

    def forward(self, x: Tensor, cache: LayerCache | None = None, visible: Tensor | None = None) -> Tensor:
        """Attend to the positions of the row.

        Args:
            x: (rows, length, width)
            cache: None; these positions are read once.
            visible: (rows, 1, 1, length) booleans: the positions that are seen, such as those without padding.
                None: all.

        Returns:
            (rows, length, width)
        """
        q, k, v = self.project(x)
        if self.rotary:
            q, k = rotate_alike((q, k), torch.arange(x.shape[1], device=x.device), self.rotary)
        return self.merge(attention(q, k, v, visible, self.dropout_now))


class CrossAttention(InContext):
    """Multi-head attention of latents to inputs. Rotary positions are an option.

    Queries, keys and values have the width of the inputs. The output has the width of the latents.
    """

    def __init__(self, width: int, input_width: int, heads: int, rotary: Rotary | None, bias: bool = False) -> None:
        """Build the layer.

        Args:
            width: channels of the latents and of the output.
            input_width: channels of the inputs.
            heads: attention heads; they divide the inputs' width.
            rotary: rotary positions; None means none.
            bias: whether the linear maps have biases.
        """
        super().__init__()
        self.heads, self.rotary, self.head_width = heads, rotary, input_width // heads
        self.query = nn.Linear(width, input_width, bias)
        self.key_value = nn.Linear(input_width, 2 * input_width, bias)
        self.output = nn.Linear(input_width, width, bias)

    def own_fused_matrices(self) -> dict[str, int]:
        """Return the matrices of keys and values; see `FusesMatrices`."""
        return {"key_value.weight": 2}

    def forward(
        self,
        latents: Tensor,
        inputs: Tensor,
        places: Tensor,
        input_places: Tensor,
        visible: "Tensor | CausalMask | BlockMask | None",
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend from latents to the inputs that they may see.

        Args:
            latents: (rows, N, width)
            inputs: (rows, M, input_width); with a cache, the inputs that follow the cached ones.
            places: (rows, N) or (N,) position of each latent.
            input_places: (rows, M) or (M,) position of each input.
            visible: mask over the cached inputs and these, as `attention` takes it. If rows are cut: of all
                latents over this rank's inputs, as `merged_attention` takes it.
            cache: keys and values of earlier inputs.

        Returns:
            (rows, N, width)
        """
        rows, length, input_width = inputs.shape
        q = self.query(latents).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.key_value(inputs).view(rows, length, 2, self.heads, input_width // self.heads)
        k, v = kv.permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = rotate(q, places, self.rotary), rotate(k, input_places, self.rotary)
        if cache is not None:
            k, v = cache.append(k, v)
        if self.context.cuts_positions:
            assert isinstance(visible, Tensor)
            mixed = merged_attention(q, k, v, visible, self.context)
        else:
            mixed = attention(q, k, v, visible)
        return self.output(mixed.transpose(1, 2).flatten(2))
