"""Encoder with a decoder over bytes: the Transformer of Vaswani et al. 2017 (arXiv:1706.03762).

    source (S) ─▶ embeddings, positions ─▶ blocks, in which all positions see each other ─────────────┐ states
    start, then the target shifted by one (n) ─▶ blocks: causal attention, attention to the states ◀──┘
                                              ─▶ tied head: nats of every id of the target

Output t depends on the whole source, and on the ids of the target before t. Padding of the source is not seen. With
spans hidden from the source, it is trained as T5 and ByT5 are (arXiv:1910.10683, arXiv:2105.13626).
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.vocabulary import VOCABULARY
from pretrain.models.base import ByteModel, units_of
from pretrain.models.bidirectional import unpadded
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.feed_forward import Activation, FeedForward
from pretrain.models.blocks.multi_head import Attention, CrossAttention, FullAttention
from pretrain.models.blocks.norms import LayerNorm
from pretrain.models.blocks.positioned import AddedPositions, PositionedIds, Positions
from pretrain.models.blocks.transformer import DecoderBlock, NormPlace, Stack, StackConfig, last_norm, linear_weights
from pretrain.models.blocks.unit import Unit, run_unit
from pretrain.models.initial import Initial
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, register_family
from pretrain.objectives import Visibility


class EncoderDecoderConfig(StackConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Transformer encoder with a decoder over bytes."""

    family: Literal["encoder_decoder"] = "encoder_decoder"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: ids of a training row, of which the objective makes a source and a target."""
    source_length: int = Field(ge=1)
    """S: most ids of a source, which all see each other."""
    target_length: int = Field(ge=1)
    """Most ids of a target, with the separator that ends it."""
    special_ids: int = Field(default=0, ge=0)
    """Ids that the objective adds to bytes, separator and padding. span_corruption adds one for each span of a row."""
    encoder_layers: int | None = Field(default=None, ge=0)
    """Blocks of the encoder. Null: as many as the decoder has, which is `layers`."""
    positions: Positions = "sinusoidal"
    """Encoding of positions. learned: two tables. sinusoidal: added sines. rotary: in self-attention layers."""
    activation: Activation = "relu"
    """Activation of the feed-forward layers. The paper's is relu."""
    norm: NormPlace = "pre"
    """Place of the norms. pre: before each layer, and after the last block. post: after each sum, as in the paper."""
    scale_embeddings: bool = True
    """Whether the first layers read embeddings times the root of the width, as in the paper."""
    biases: bool = True
    """Whether linear maps and the head have biases."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of each layer's output, of the first layers' inputs and of self-attention weights that training drops."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights. They are normal, cut at two deviations."""


class EncoderDecoder(ByteModel):
    """Transformer encoder with a decoder over bytes, and one table of ids for both and for the head."""

    evaluation_modes = frozenset()

    def __init__(self, config: EncoderDecoderConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.sequence_length = config.sequence_length
        self.source_length, self.target_length = config.source_length, config.target_length
        self.initial_std = config.initial_std
        width, dropout = config.width, config.dropout
        self.read = PositionedIds(
            VOCABULARY + config.special_ids,
            width,
            config.source_length,
            config.positions,
            scale=width**0.5 if config.scale_embeddings else 1.0,
            dropout=dropout,
        )
        self.written = AddedPositions(width, config.target_length, config.positions, dropout)
        self.start = nn.Parameter(torch.empty(width))
        layers = config.layers if config.encoder_layers is None else config.encoder_layers
        encoder = StackConfig(width=width, layers=layers, heads=config.heads)
        attention = partial(FullAttention, rotary=self.read.rotary, bias=config.biases)
        self.encoder = Stack(encoder, config.activation, dropout, attention, config.biases, norm_place=config.norm)
        self.decoder_blocks = nn.ModuleList(self._block(config) for _ in range(config.layers))
        self.norm = LayerNorm(width) if config.norm == "pre" else nn.Identity()
        self.head_bias = nn.Parameter(torch.empty(VOCABULARY + config.special_ids)) if config.biases else None
        self.initialize()

    def _block(self, config: EncoderDecoderConfig) -> DecoderBlock:
        width, heads, biases = config.width, config.heads, config.biases
        return DecoderBlock(
            width,
            Attention(width, heads, config.dropout, self.written.rotary, bias=biases),
            CrossAttention(width, width, heads, None, biases),
            FeedForward(width, config.activation, bias=biases),
            config.dropout,
            config.norm,
        )

    def model_initial(self, name: str) -> Initial:
        """Return a normal distribution with the deviation of the config, and 0 for biases.

        Scaled embeddings, and the start among them, have the inverse of the root of the width, so that what the first
        layer reads has deviation 1.
        """
        if name.endswith("bias"):
            return Initial()
        is_scaled = self.read.scale != 1.0 and name == "read.table.weight"
        return Initial(1 / self.read.scale if is_scaled else self.initial_std)

    def forward(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of every id of a target.

        Args:
            ids: (rows, n) target, n <= target_length.
            given: (rows, m) source, m <= source_length.

        Returns:
            (rows, n) fp32 nats.
        """
        if given is None:
            raise ValueError("an encoder with a decoder reads a source, as its objective makes it, and got none")
        states, seen = self.encode(given)
        return self.nats(self.decode(self.embed(ids[:, :-1]), states, seen), ids.long())

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Read a source.

        Args:
            source: (rows, m) ids; padding at the end is not seen.

        Returns:
            The (rows, m, D) states of the encoder, and the mask of those that are seen, (rows, 1, 1, m).

        Raises:
            ValueError: it is longer than source_length.
        """
        if source.shape[1] > self.source_length:
            raise ValueError(
                f"a source of {source.shape[1]} ids is longer than the model's source length, {self.source_length}"
            )
        visible = unpadded(source)
        states: Tensor = self.encoder(self.read(self.read.embed(source)), None, visible)
        return states, visible

    def embed(self, before: Tensor) -> Tensor:
        """Return what positions of a target read: the learned start, then the embeddings of the ids before.

        Args:
            before: (rows, n) first ids of the target.

        Returns:
            (rows, n + 1, D)

        Raises:
            ValueError: these are more than target_length.
        """
        if before.shape[1] >= self.target_length:
            raise ValueError(
                f"a target of {before.shape[1] + 1} ids is longer than the model's target length, {self.target_length}"
            )
        start = self.start.expand(before.shape[0], 1, -1)
        embedded: Tensor = self.written(torch.cat([start, self.read.embed(before)], 1))
        return embedded

    def decode(
        self,
        x: Tensor,
        states: Tensor,
        seen: Tensor,
        caches: "Sequence[tuple[LayerCache, LayerCache]] | None" = None,
    ) -> Tensor:
        """Return the (rows, n, D) last hidden states of the decoder.

        Args:
            x: (rows, n, D) what the positions read; with caches, those after the cached ones.
            states: (rows, m, D) states of the encoder; none if the caches have read them.
            seen: (rows, 1, 1, m) states that are seen, also of those in caches.
            caches: of self-attention and of the source, for each block.
        """
        for index, block in enumerate(self.decoder_blocks):
            x = run_unit(block, x, states, seen, *(caches[index] if caches is not None else (None, None)))
        normed: Tensor = self.norm(x)
        return normed

    def empty_example(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return a made-up target and a made-up source of full length; see `ByteModel.empty_example`."""
        lengths = (self.target_length, self.source_length)
        target, source = (torch.zeros(rows, length, dtype=torch.long, device=device) for length in lengths)
        return target, source

    def stacks(self) -> dict[str, list[Unit]]:
        """Return the blocks of the encoder and of the decoder."""
        return {"encoder": units_of(self.encoder), "decoder": units_of(self.decoder_blocks)}

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the table of ids, and the biases of the head if it has them."""
        return self.read.table.weight, self.head_bias

    def head_norm(self) -> nn.Module | None:
        """Return the last norm of the decoder."""
        return last_norm(self.norm, self.decoder_blocks)

    def table_factors(self) -> dict[str, float]:
        """Return the factor of the embeddings that the first layer reads."""
        return {"read.table.weight": self.read.scale}

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> "EncoderDecoderDecoder":
        """Return a new decoder of `rows` rows. It reads the sources first, by `encode`."""
        return EncoderDecoderDecoder(self, rows)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products over a source of full length and a target.

        Args:
            length: ids of the target; target_length if it is less.
        """
        n, m, width = min(length, self.target_length), self.source_length, self.encoder.width
        blocks = [block for block in self.decoder_blocks if isinstance(block, DecoderBlock)]
        of_source = sum(linear_weights(block.cross_attention.key_value) for block in blocks)
        of_target = linear_weights(self.decoder_blocks) - of_source
        attention = len(blocks) * 4 * n * (n + m) * width
        head = 2 * n * width * self.read.table.num_embeddings
        return self.encoder.flops(m) + 2 * (n * of_target + m * of_source) + attention + head


class EncoderDecoderDecoder:
    """Decoder over cached keys and values of the target, and of the source, which is read once."""

    def __init__(self, model: EncoderDecoder, rows: int) -> None:
        """Make a decoder of `rows` rows with empty caches."""
        self.length = 0
        self._model = model
        self._caches = [(LayerCache(), LayerCache()) for _ in model.decoder_blocks]
        self._states = torch.zeros(rows, 0, model.encoder.width, device=model.start.device, dtype=model.start.dtype)
        self._seen: Tensor | None = None

    @torch.no_grad()
    def encode(self, source: Tensor) -> None:
        """Read the sources of the rows; see `EncodingDecoder.encode`."""
        if self._seen is not None:
            raise ValueError("a decoder reads its sources once")
        self._states, self._seen = self._model.encode(source)

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed the first ids of the targets; see `Decoder.prime`."""
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        x = self._model.embed(ids)
        self.length = ids.shape[1]
        return self._logits(x)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        model = self._model
        if self.length + 1 >= model.target_length:
            raise ValueError(f"the target is full: it holds {self.length} of {model.target_length} ids")
        self.length += 1
        x: Tensor = model.written(model.read.embed(ids[:, None]), self.length)
        return self._logits(x)

    def select(self, rows: Tensor) -> None:
        """Replace the rows by some of them; see `EncodingDecoder.select`."""
        assert self._seen is not None
        self._seen, self._states = self._seen[rows], self._states[rows]
        for cache in (cache for caches in self._caches for cache in caches):
            cache.select(rows)

    def _logits(self, x: Tensor) -> Tensor:
        if self._seen is None:
            raise ValueError("the decoder has no sources; call encode first")
        states = self._model.decode(x, self._states, self._seen, self._caches)[:, -1]
        self._states = self._states[:, :0]  # their keys and values are in the caches
        return self._model.logits(states)


register_family(
    Family(
        name="encoder_decoder",
        reference=REFERENCES / "encoder_decoder.py",
        config=EncoderDecoderConfig,
        build=EncoderDecoder,
        free_fields=frozenset({"sequence_length", "dropout", "initial_std"}),
        visibilities=lambda _: frozenset({Visibility.encoder_decoder}),
        small={
            "sequence_length": 32,
            "source_length": 28,
            "target_length": 7,
            "special_ids": 1,
            "width": 32,
            "layers": 2,
            "encoder_layers": 1,
            "heads": 2,
            "dropout": 0.1,
        },
    )
)
