"""Multi-head attention layers: the linear maps around attention."""

import torch
from torch import Tensor, nn

from pretrain.models.blocks.attention import CausalMask, attention, causal_attention, window_attention
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.positions import Rotary, rotate


class MultiHead(nn.Module):
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
        self.heads, self.dropout = heads, dropout
        self.query_key_value = nn.Linear(width, 3 * width, bias)
        self.output = nn.Linear(width, width, bias)

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
    ) -> None:
        """Build the layer.

        Args:
            width: channels of the input and of the output.
            heads: attention heads; they divide the width.
            dropout: share of attention weights that is dropped in training.
            rotary: rotary positions; None means none.
            window: positions that a position sees; None means all before it.
            bias: whether the linear maps have biases.
        """
        super().__init__(width, heads, dropout, bias)
        self.rotary, self.window = rotary, window

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Attend to the positions before each position, and to those in a cache.

        Args:
            x: (rows, length, width); with a cache, the positions that follow the cached ones.
            cache: an empty cache, or any cache if x is one position long. With a window of w, its limit is w - 1.

        Returns:
            (rows, length, width)
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
        self.heads, self.rotary = heads, rotary
        self.query = nn.Linear(width, input_width, bias)
        self.key_value = nn.Linear(input_width, 2 * input_width, bias)
        self.output = nn.Linear(input_width, width, bias)

    def forward(
        self,
        latents: Tensor,
        inputs: Tensor,
        places: Tensor,
        visible: Tensor | CausalMask | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attend from latents to the inputs that they may see.

        Args:
            latents: (rows, N, width)
            inputs: (rows, M, input_width); with a cache, the inputs that follow the cached ones.
            places: (rows, N) or (N,) position of each latent among the inputs.
            visible: mask over the cached inputs and these, as `attention` takes it.
            cache: keys and values of earlier inputs.

        Returns:
            (rows, N, width)
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
