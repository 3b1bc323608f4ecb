"""Perceiver IO: learned latents read a row, and learned queries read the latents.

    ids with masks ─ embeddings, positions ─▶ inputs (T, W) ─ keys, values ─▶ cross-attend ◀─ queries ─ latents (N, C)
                                                                                   │
                                                L blocks in which latents see each other, run R times
                                                                                   │ keys, values
                              queries (T, W), one a position ─────────▶ cross-attend
                                                                             │
                          tied head: nats of the id at every position ◀──────┘

Jaegle et al. 2021, arXiv:2107.14795, as in the authors' code (deepmind-research, folder perceiver). The cost grows with
T x N, not with T². With `cross_attend_every_repeat` the latents read the inputs before each of the R repetitions, as in
Perceiver (Jaegle et al. 2021, arXiv:2103.03206). Padding is not seen.
"""

from typing import Literal, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import VOCABULARY
from pretrain.models.base import units_of
from pretrain.models.bidirectional import BidirectionalModel, unpadded
from pretrain.models.blocks.feed_forward import Activation, FeedForward
from pretrain.models.blocks.latent_attention import LatentAttention, LatentBlock
from pretrain.models.blocks.positioned import PositionedIds
from pretrain.models.blocks.transformer import StackConfig
from pretrain.models.blocks.unit import Unit, run_unit
from pretrain.models.initial import Initial
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, register_family
from pretrain.objectives import Visibility


class PerceiverIOConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Perceiver IO (arXiv:2107.14795) over bytes."""

    family: Literal["perceiver_io"] = "perceiver_io"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: ids of a row, which the latents read, and positions that are predicted."""
    special_ids: int = Field(default=1, ge=1)
    """Ids that the objective adds to bytes, separator and padding. masked and classification add one, 258, which hides
    a byte."""
    latents: int = Field(default=256, ge=1)
    """N: learned vectors that read the row."""
    latent_model: StackConfig
    """Blocks in which the latents see each other."""
    repeats: int = Field(default=1, ge=1)
    """R: times that these blocks run, one after the other, with the same weights."""
    cross_attend_every_repeat: bool = False
    """True: the latents read the row before each repetition, as in Perceiver. The first reading has its own weights,
    and the later ones share theirs. False: they read the row once."""
    input_width: int = Field(default=768, ge=1)
    """W: channels of the inputs, of the output queries and of the tied embeddings."""
    cross_heads: int = Field(default=8, ge=1)
    """Heads of the cross-attends. They divide latent_model.width, input_width and query_key_width."""
    query_key_width: int = Field(default=256, ge=1)
    """Channels of the queries and of the keys of all heads, in every attention layer. Values are as wide as the
    positions that read them."""
    widening: int = Field(default=1, ge=1)
    """Channels within a feed-forward layer, for each channel of its input."""
    activation: Activation = "gelu_tanh"
    """Activation of the feed-forward layers. The authors' is gelu_tanh."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of each layer's output that training drops, in the blocks that make latents. Attention weights have no
    dropout."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial embeddings, positions, latents and queries, cut at two deviations. Linear maps
    begin with variance 1/inputs."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        for name, heads in (("cross_heads", self.cross_heads), ("latent_model.heads", self.latent_model.heads)):
            if self.query_key_width % heads:
                raise ValueError(f"{name} ({heads}) does not divide query_key_width ({self.query_key_width})")
        for name, width in (("latent_model.width", self.latent_model.width), ("input_width", self.input_width)):
            if width % self.cross_heads:
                raise ValueError(f"cross_heads ({self.cross_heads}) does not divide {name} ({width})")
        if self.cross_attend_every_repeat and self.repeats == 1:
            raise ValueError("cross_attend_every_repeat needs repeats of 2 or more")
        return self


class PerceiverIO(BidirectionalModel):
    """Perceiver IO with a tied head."""

    def __init__(self, config: PerceiverIOConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.config = config
        self.sequence_length = config.sequence_length
        width, input_width = config.latent_model.width, config.input_width
        symbols = VOCABULARY + config.special_ids
        self.read = PositionedIds(symbols, input_width, config.sequence_length, "learned", scale=1.0, dropout=0.0)
        self.latents = nn.Parameter(torch.empty(config.latents, width))
        self.queries = nn.Parameter(torch.empty(config.sequence_length, input_width))
        self.head_bias = nn.Parameter(torch.empty(VOCABULARY))

        def feed_forward(width: int) -> FeedForward:
            return FeedForward(width, config.activation, config.widening * width, bias=True)

        def input_block() -> LatentBlock:
            attention = LatentAttention(width, input_width, config.cross_heads, config.query_key_width)
            return LatentBlock(width, attention, feed_forward(width), config.dropout, input_width=input_width)

        def latent_block() -> LatentBlock:
            attention = LatentAttention(width, width, config.latent_model.heads, config.query_key_width)
            return LatentBlock(width, attention, feed_forward(width), config.dropout)

        self.input_blocks = nn.ModuleList(input_block() for _ in range(1 + config.cross_attend_every_repeat))
        self.latent_blocks = nn.ModuleList(latent_block() for _ in range(config.latent_model.layers))
        self.output_block = LatentBlock(
            input_width,
            LatentAttention(input_width, width, config.cross_heads, config.query_key_width),
            feed_forward(input_width),
            input_width=width,
            adds_queries=False,
        )
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        """Return the authors' choice: weights of variance 1/inputs, tables of the config's deviation, biases of 0."""
        if name.endswith("bias"):
            return Initial()
        module = self.get_submodule(name.rpartition(".")[0])
        cut = 0.8796  # the deviation of a standard normal distribution that is cut at two deviations
        return Initial(module.in_features**-0.5 / cut if isinstance(module, nn.Linear) else self.config.initial_std)

    def encode(self, given: Tensor) -> Tensor:
        """Return the (rows, T, W) states that predict the ids at their positions, given (rows, T) ids."""
        rows, length = given.shape
        queries = self.queries[:length].repeat(rows, 1, 1)
        return run_unit(self.output_block, queries, self.encode_latents(given))

    def encode_latents(self, given: Tensor) -> Tensor:
        """Return the (rows, N, C) latents that have read (rows, T) ids."""
        inputs, visible = self.read(self.read.embed(given)), unpadded(given)
        z = self.latents.repeat(len(given), 1, 1)
        for repeat in range(self.config.repeats):
            if repeat == 0 or self.config.cross_attend_every_repeat:
                z = run_unit(self.input_blocks[min(repeat, 1)], z, inputs, visible)
            for block in self.latent_blocks:
                z = run_unit(block, z)
        return z

    def stacks(self) -> dict[str, list[Unit]]:
        """Return the blocks that read the row, those of the latents, and the one of the output queries."""
        return {
            "inputs": units_of(self.input_blocks),
            "latents": units_of(self.latent_blocks),
            "output": [self.output_block],
        }

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings of the vocabulary, and the biases of the head."""
        return self.read.table.weight[:VOCABULARY], self.head_bias

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; see `ByteModel.flops`."""
        config, n = self.config, self.config.latents
        reads = config.repeats if config.cross_attend_every_repeat else 1
        of_reads = reads * _block_flops(self.input_blocks[0], n, length)
        of_latents = config.repeats * sum(_block_flops(block, n, n) for block in self.latent_blocks)
        of_output = self.output_block.flops(length, n) + 2 * length * config.input_width * VOCABULARY
        return of_reads + of_latents + of_output


def _block_flops(block: nn.Module, n: int, m: int) -> int:
    assert isinstance(block, LatentBlock)
    return block.flops(n, m)


register_family(
    Family(
        name="perceiver_io",
        reference=REFERENCES / "perceiver_io.py",
        config=PerceiverIOConfig,
        build=PerceiverIO,
        free_fields=frozenset({"dropout", "initial_std"}),
        visibilities=lambda _: frozenset({Visibility.bidirectional}),
        small={
            "sequence_length": 32,
            "latents": 8,
            "latent_model": {"width": 32, "layers": 2, "heads": 2},
            "repeats": 2,
            "input_width": 16,
            "cross_heads": 2,
            "query_key_width": 8,
            "dropout": 0.1,
        },
    )
)
