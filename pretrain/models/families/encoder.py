"""Bidirectional Transformer encoder over bytes, as BERT is (Devlin et al. 2019, arXiv:1810.04805).

    ids with masks (T) ─▶ embeddings and positions ─▶ blocks, in which all positions see each other ─▶ tied head

Output t depends on all ids that are read. It is the negative log-likelihood of the id at position t of the row without
masks. Padding is not seen. An encoder has no bits per byte and does not generate: its loss is in bits per masked byte.
"""

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.vocabulary import VOCABULARY
from pretrain.models.bidirectional import BidirectionalModel, unpadded
from pretrain.models.blocks.feed_forward import Activation
from pretrain.models.blocks.multi_head import FullAttention
from pretrain.models.blocks.positioned import PositionedIds, Positions
from pretrain.models.blocks.transformer import NormPlace, Stack, StackConfig
from pretrain.models.initial import Initial
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, register_family
from pretrain.objectives import Visibility


class EncoderConfig(StackConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Bidirectional Transformer encoder over bytes."""

    family: Literal["encoder"] = "encoder"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: ids of a row, which all see each other."""
    special_ids: int = Field(default=1, ge=1)
    """Ids that the objective adds to bytes, separator and padding. masked adds one, 258, which hides a byte."""
    positions: Positions = "learned"
    """Encoding of positions. learned: a table of T positions. sinusoidal: added sines. rotary: in every layer."""
    activation: Activation = "gelu"
    """Activation of the feed-forward layers. BERT's is gelu."""
    norm: NormPlace = "pre"
    """Place of the norms. pre: before each layer, and after the last block. post: after each sum, as in BERT."""
    scale_embeddings: bool = False
    """Whether the first layer reads embeddings times the root of the width."""
    biases: bool = True
    """Whether linear maps and the head have biases."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of attention weights, of each layer's output and of the first layer's input that training drops."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights. They are normal, cut at two deviations."""


class Encoder(BidirectionalModel):
    """Bidirectional Transformer encoder over bytes with a tied head."""

    def __init__(self, config: EncoderConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.sequence_length = config.sequence_length
        self.initial_std = config.initial_std
        self.read = PositionedIds(
            VOCABULARY + config.special_ids,
            config.width,
            config.sequence_length,
            config.positions,
            scale=config.width**0.5 if config.scale_embeddings else 1.0,
            dropout=config.dropout,
        )
        attention = partial(FullAttention, rotary=self.read.rotary, bias=config.biases)
        self.stack = Stack(config, config.activation, config.dropout, attention, config.biases, norm_place=config.norm)
        self.head_bias = nn.Parameter(torch.empty(VOCABULARY)) if config.biases else None
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        """Return a normal distribution with the deviation of the config, and 0 for biases."""
        return Initial() if name.endswith("bias") else Initial(self.initial_std)

    def encode(self, given: Tensor) -> Tensor:
        """Return the (rows, T, D) states of the last block, given (rows, T) ids."""
        states: Tensor = self.stack(self.read(self.read.embed(given)), None, unpadded(given))
        return states

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings of the vocabulary, and the biases of the head if it has them."""
        return self.read.table.weight[:VOCABULARY], self.head_bias

    def head_norm(self) -> nn.Module | None:
        """Return the last norm of the stack."""
        return self.stack.last_norm

    def table_factors(self) -> dict[str, float]:
        """Return the factor of the embeddings that the first layer reads."""
        return {"read.table.weight": self.read.scale}

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; see `ByteModel.flops`."""
        return self.stack.flops(length) + 2 * length * self.stack.width * VOCABULARY


register_family(
    Family(
        name="encoder",
        reference=REFERENCES / "encoder.py",
        config=EncoderConfig,
        build=Encoder,
        free_fields=frozenset({"dropout", "initial_std"}),
        visibilities=lambda _: frozenset({Visibility.bidirectional}),
        small={"sequence_length": 32, "width": 32, "layers": 2, "heads": 2, "dropout": 0.1},
    )
)
