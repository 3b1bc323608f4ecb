"""Pre-norm Transformer blocks, blocks that attend to other inputs, and stacks of blocks."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from pretrain.models.blocks.attention import CausalMask, takes_blocks
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.context import Dropout, InContext
from pretrain.models.blocks.documents import visible_in_documents
from pretrain.models.blocks.feed_forward import Activation, FeedForward
from pretrain.models.blocks.multi_head import Attention, CrossAttention, MultiHead
from pretrain.models.blocks.norms import LayerNorm
from pretrain.models.blocks.unit import Unit, run_unit

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


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


NormPlace = Literal["pre", "post"]
"""Place of the norms. pre: before each layer, and after the last block (Xiong et al. 2020). post: after each sum of a
layer's input and output, and none after the last block (Vaswani et al. 2017)."""


class PreNorm(Unit):
    """Base of the blocks: attention and a feed-forward layer, each after a norm, added to the residual stream."""

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        feed_forward: FeedForward,
        dropout: float,
        norm: Callable[[int], nn.Module] = LayerNorm,
    ) -> None:
        """Build the norms around the two layers.

        Args:
            width: channels of the residual stream.
            attention: attention layer.
            feed_forward: feed-forward layer.
            dropout: share of the output of each layer that is dropped in training.
            norm: makes a norm of a number of channels.
        """
        super().__init__()
        self.attention_norm = norm(width)
        self.attention = attention
        self.feed_forward_norm = norm(width)
        self.feed_forward = feed_forward
        self.dropout = Dropout(dropout)

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the output of attention, then that of the feed-forward layer, to the residual stream.

        Args:
            x: (rows, length, width) residual stream.
            attended: (rows, length, width) output of attention.

        Returns:
            (rows, length, width)
        """
        x = x + self.dropout(attended)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class TransformerBlock(PreNorm):
    """Pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x)). Post-norm is an option."""

    norm_place: NormPlace = "pre"

    def forward(self, x: Tensor, cache: LayerCache | None = None, *shared: Any) -> Tensor:
        """Map (rows, length, width) to the same shape.

        Args:
            x: residual stream.
            cache: passed to the attention layer.
            *shared: passed to the attention layer.
        """
        if self.norm_place == "post":
            x = self.attention_norm(x + self.dropout(self.attention(x, cache, *shared)))
            return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return self.add(x, self.attention(self.attention_norm(x), cache, *shared))


class CrossBlock(PreNorm):
    """Pre-norm block whose attention reads other inputs, which have a norm of their own."""

    attention: CrossAttention

    def __init__(
        self, width: int, input_width: int, attention: CrossAttention, feed_forward: FeedForward, dropout: float
    ) -> None:
        """Build the norms around the two layers.

        Args:
            width: channels of the residual stream.
            input_width: channels of the inputs.
            attention: attention layer.
            feed_forward: feed-forward layer.
            dropout: share of the output of each layer that is dropped in training.
        """
        super().__init__(width, attention, feed_forward, dropout)
        self.input_norm = LayerNorm(input_width)

    def forward(
        self,
        z: Tensor,
        inputs: Tensor,
        places: Tensor,
        input_places: Tensor,
        visible: "Tensor | CausalMask | BlockMask | None",
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Map (rows, N, width) latents to the same shape; see `CrossAttention.forward` for the arguments."""
        latents, inputs = self.attention_norm(z), self.input_norm(inputs)
        return self.add(z, self.attention(latents, inputs, places, input_places, visible, cache))


class DecoderBlock(Unit):
    """Block of a decoder with an encoder: causal attention, attention to the encoder's states, feed-forward layer.

    Each layer is added to the residual stream. A norm precedes it, or follows the sum (Vaswani et al. 2017).
    """

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        cross_attention: CrossAttention,
        feed_forward: FeedForward,
        dropout: float,
        norm_place: NormPlace,
    ) -> None:
        """Build the norms around the three layers.

        Args:
            width: channels of the residual stream.
            attention: causal attention layer.
            cross_attention: attention layer that reads the encoder's states.
            feed_forward: feed-forward layer.
            dropout: share of the output of each layer that is dropped in training.
            norm_place: place of the norms.
        """
        super().__init__()
        self.norm_place = norm_place
        self.attention_norm = LayerNorm(width)
        self.attention = attention
        self.cross_attention_norm = LayerNorm(width)
        self.cross_attention = cross_attention
        self.feed_forward_norm = LayerNorm(width)
        self.feed_forward = feed_forward
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        states: Tensor,
        seen: Tensor,
        cache: LayerCache | None = None,
        source_cache: LayerCache | None = None,
    ) -> Tensor:
        """Map (rows, length, width) to the same shape.

        Args:
            x: residual stream.
            states: (rows, m, width) states of the encoder; with a cache, those that follow the cached ones.
            seen: (rows, 1, 1, m) booleans: states that are seen, the cached ones among them.
            cache: of the causal attention.
            source_cache: of the attention to the states.
        """
        nowhere = x.new_empty(0)  # no positions in the attention to the states
        x = self._added(x, self.attention_norm, lambda x: self.attention(x, cache))
        x = self._added(
            x,
            self.cross_attention_norm,
            lambda x: self.cross_attention(x, states, nowhere, nowhere, seen, source_cache),
        )
        return self._added(x, self.feed_forward_norm, self.feed_forward)

    def _added(self, x: Tensor, norm: LayerNorm, layer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_place == "post":
            normed: Tensor = norm(x + self.dropout(layer(x)))
            return normed
        added: Tensor = x + self.dropout(layer(norm(x)))
        return added


AttentionMaker = Callable[[int, int, float], MultiHead]
"""Function from width, heads and dropout to one layer's attention."""


class Stack(InContext):
    """Transformer blocks in order, and the final norm of a pre-norm stack."""

    def __init__(
        self,
        config: StackConfig,
        activation: Activation,
        dropout: float,
        attention: AttentionMaker = Attention,
        bias: bool = False,
        attention_dropout: float | None = None,
        norm_place: NormPlace = "pre",
    ) -> None:
        """Build the blocks.

        Args:
            config: size of the stack.
            activation: activation of the feed-forward layers.
            dropout: share of the output of each layer that is dropped in training.
            attention: makes each block's attention layer.
            bias: whether the maps of the feed-forward layers have biases.
            attention_dropout: share of attention weights that is dropped in training. None: as `dropout`.
            norm_place: place of the norms.
        """
        super().__init__()
        self.width = config.width
        self.attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.head_width = config.width // config.heads
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config.width,
                attention(config.width, config.heads, self.attention_dropout),
                FeedForward(config.width, activation, bias=bias),
                dropout,
            )
            for _ in range(config.layers)
        )
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            block.norm_place = norm_place
        self.norm = LayerNorm(config.width) if norm_place == "pre" else nn.Identity()

    def forward(self, x: Tensor, caches: list[LayerCache] | None = None, *shared: Any) -> Tensor:
        """Map (rows, length, width) to the same shape.

        Args:
            x: input of the first block.
            caches: one cache a block, as `Attention.forward` takes it.
            *shared: passed to the attention of every block.
        """
        for index, block in enumerate(self.blocks):
            x = run_unit(block, x, caches[index] if caches is not None else None, *shared)
        normed: Tensor = self.norm(x)
        return normed

    @property
    def last_norm(self) -> nn.Module | None:
        """Norm of the output of the stack; None for a post-norm stack without blocks."""
        return last_norm(self.norm, self.blocks)

    def visible(self, documents: Tensor, x: Tensor) -> "Tensor | BlockMask":
        """Return the mask in which positions see the earlier positions of their documents.

        Args:
            documents: (rows, keys) document of each position that may be seen.
            x: (rows, n, width) input of the first block at the last n of these positions; at this rank's part of them
                if rows are cut.
        """
        keys, count = documents.shape[1], x.shape[1]
        before = self.context.first(count) if self.context.cuts_positions else keys - count
        in_blocks = self.takes_blocks(x, keys)
        first = documents.new_full((len(x),), before)
        return visible_in_documents(documents[:, before : before + count], documents, first, in_blocks=in_blocks)

    def takes_blocks(self, x: Tensor, keys: int) -> bool:
        """Return whether masks of `keys` keys are blocks for FlexAttention; see `takes_blocks`."""
        return takes_blocks(x, self.head_width, keys, self.attention_dropout if self.training else 0.0)

    def empty_caches(self, limit: int | None = None) -> list[LayerCache]:
        """Return an empty cache for each block, which keeps `limit` positions; None keeps all."""
        return [LayerCache(limit) for _ in self.blocks]

    def flops(self, length: int, pairs: int | None = None) -> int:
        """Return the operations of all matrix products over one row: 2 a weight and position, and attention.

        Args:
            length: positions of the row.
            pairs: pairs of a query and a key that attention multiplies, masked or not; None means length².
        """
        attention = len(self.blocks) * 4 * (length * length if pairs is None else pairs) * self.width
        return 2 * length * linear_weights(self) + attention


def last_norm(norm: nn.Module, blocks: nn.ModuleList) -> nn.Module | None:
    """Return the norm after blocks, which is within the last one if `norm` is the identity; None without any."""
    if not isinstance(norm, nn.Identity):
        return norm
    return blocks[-1].get_submodule("feed_forward_norm") if len(blocks) else None


def linear_weights(module: nn.Module) -> int:
    """Return the weights of all linear maps in a module; a position costs two operations with each."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
