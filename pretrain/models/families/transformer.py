"""Decoder-only Transformer over bytes, with full causal attention or a sliding window.

It is the baseline of MEGABYTE (arXiv:2305.07185, table 15) and, with a window, of SpaceByte (arXiv:2404.14408):

    learned start, then ids shifted by one (T, D) ─▶ pre-norm blocks ─▶ tied head: nats of every byte

Output t depends only on the ids before t. Linear maps have no bias.
"""

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.vocabulary import VOCABULARY
from pretrain.models.base import ByteModel
from pretrain.models.blocks.attention import window_pairs
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation
from pretrain.models.blocks.multi_head import Attention
from pretrain.models.blocks.positions import Rotary
from pretrain.models.blocks.transformer import Stack, StackConfig
from pretrain.models.initial import Initial
from pretrain.models.registry import Family, register_family


class TransformerConfig(StackConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Decoder-only Transformer over bytes."""

    family: Literal["transformer"] = "transformer"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence and the longest context."""
    window: int | None = Field(default=None, ge=1)
    """Positions that attention sees in each layer: its own and those right before it. A byte then depends on layers x
    (window - 1) + 1 bytes before it. Null: all."""
    positions: Literal["learned", "rotary"] = "rotary"
    """Encoding of positions: a learned table of T positions, or rotary angles in every attention layer."""
    activation: Activation = "relu"
    """Activation of the feed-forward layers; MEGABYTE's baseline has relu."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of attention weights, and of the output of each layer, that is dropped in training. Embeddings have no
    dropout."""
    initial_std: float = Field(default=0.006, gt=0)
    """Standard deviation of the initial weights, a normal distribution cut at two deviations. MEGABYTE's is 0.006."""


class Transformer(ByteModel):
    """Decoder-only Transformer over bytes with a tied head."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.sequence_length = config.sequence_length
        self.window = config.window
        self.initial_std = config.initial_std
        self.embedding = embedding(VOCABULARY, config.width)
        self.start = nn.Parameter(torch.empty(config.width))
        self.positions: nn.Parameter | None = None
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(config.sequence_length, config.width))
        rotary = Rotary() if config.positions == "rotary" else None
        attention = partial(Attention, rotary=rotary, window=config.window)
        self.stack = Stack(config, config.activation, config.dropout, attention)
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        """Return a normal distribution with the deviation of the config."""
        return Initial(self.initial_std)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the negative log-likelihood of every id; see `ByteModel.forward`."""
        self.check_length(ids.shape[1])
        ids = ids.long()
        return self.nats(self.stack(self.embed(ids[:, :-1])), ids)

    def embed(self, before: Tensor) -> Tensor:
        """Map the (rows, n) first ids of rows to (rows, n + 1, D): the learned start, then their embeddings."""
        start = self.start.expand(before.shape[0], 1, -1)
        embedded = torch.cat([start, self.embedding(before)], 1)
        return embedded if self.positions is None else embedded + self.positions[: embedded.shape[1]]

    def head_weights(self) -> tuple[Tensor, None]:
        """Return the embedding table."""
        return self.embedding.weight, None

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> "TransformerDecoder":
        """Return a new decoder of `rows` rows."""
        return TransformerDecoder(self, rows)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; see `ByteModel.flops`."""
        head = 2 * length * self.stack.width * VOCABULARY
        return self.stack.flops(length, pairs=window_pairs(length, self.window)) + head


class TransformerDecoder:
    """Decoder over cached keys and values: those of the whole context, or of the last w - 1 positions of a window."""

    def __init__(self, model: Transformer, rows: int) -> None:
        """Make a decoder of `rows` rows with empty caches."""
        self.length = 0
        self._model = model
        self._caches = model.stack.empty_caches(None if model.window is None else model.window - 1)

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; see `Decoder.prime`."""
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        self._advance(ids.shape[1])
        return self._logits(self._model.embed(ids.long()))

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        model = self._model
        self._advance(1)
        embedded = model.embedding(ids.long())[:, None]
        if model.positions is not None:
            embedded = embedded + model.positions[self.length]
        return self._logits(embedded)

    def _advance(self, count: int) -> None:
        self._model.check_room(self.length + count)
        self.length += count

    def _logits(self, x: Tensor) -> Tensor:
        return self._model.logits(self._model.stack(x, self._caches)[:, -1])


register_family(
    Family(
        name="transformer",
        config=TransformerConfig,
        build=Transformer,
        free_fields=frozenset({"dropout", "initial_std"}),
        small={"sequence_length": 32, "width": 32, "layers": 2, "heads": 2, "window": 8, "dropout": 0.1},
    )
)
