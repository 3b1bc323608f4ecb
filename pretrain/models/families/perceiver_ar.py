"""Perceiver AR: one cross-attend reads a long context into a deep causal model of its last N positions.

Hawthorne et al. 2022, "General-purpose, long-context autoregressive modeling with Perceiver AR", arXiv:2202.07765. This
follows the published code (google-research/perceiver-ar) where it differs from the paper. T bytes, N latents:

    START, then ids shifted by one ─ embedding + positions ─▶ inputs (T, W)
                                                                │     └─ last N ─ linear ─▶ latents (N, C)
                                                                └─ keys, values ─▶ cross-attend ◀─ queries ┘
                                                                                        │
                                                            L causal blocks over the N latents
                                                                                        │
                                            norm, linear head: nats of the N bytes ◀────┘

The latent at position p sees inputs 0 to p and predicts byte p, which is input p + 1. A row has at most N scored
positions. Training draws which of the T positions they are: a crop. Linear maps have biases, as in the code.
"""

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, VOCABULARY
from pretrain.models.base import ByteModel
from pretrain.models.blocks.attention import CausalMask
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation, FeedForward
from pretrain.models.blocks.multi_head import Attention, CrossAttention
from pretrain.models.blocks.norms import LayerNorm
from pretrain.models.blocks.positions import Rotary, sinusoids
from pretrain.models.blocks.transformer import CrossBlock, StackConfig, TransformerBlock, linear_weights
from pretrain.models.blocks.unit import run_unit
from pretrain.models.initial import Initial
from pretrain.models.registry import Family, register_family

START = VOCABULARY
"""Input before the first byte. It has a row in the embedding and one in the head, as in the authors' code. It is never
predicted."""
DROPPED = -1e4
"""Number added to the scores of dropped inputs. It is finite, so a latent that loses all its inputs sees them all."""


class PerceiverARConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Perceiver AR (arXiv:2202.07765)."""

    family: Literal["perceiver_ar"] = "perceiver_ar"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence and the longest context."""
    latents: int = Field(default=1024, ge=1)
    """N: positions of a sequence that are modelled and scored. No parameter depends on it, so a trained model can be
    used with another number: more for better predictions, fewer for faster ones."""
    latent_model: StackConfig
    """Causal blocks over the latents."""
    input_width: int | None = Field(default=None, ge=1)
    """W: channels of the inputs, and of the cross-attend's queries, keys and values. None: the latents' width."""
    cross_heads: int = Field(default=16, ge=1)
    """Heads of the cross-attend; divides the inputs' width."""
    cross_attend_after: tuple[int, ...] = ()
    """Latent blocks, counted from 0, after which a further cross-attend reads the inputs."""
    positions: Literal["rotary", "learned", "sinusoidal", "image"] = "rotary"
    """Encoding of positions. rotary: rotary angles in every attention layer. The others are added to the inputs.
    learned: a learned table. sinusoidal: fixed sines. image: three learned tables, for a byte's column, row and channel
    in an image."""
    rotary_fraction: float = Field(default=0.5, gt=0, le=1)
    """Share of each head's channels that rotary angles turn."""
    image: tuple[int, int, int] | None = None
    """Height, width and channels of the image, for positions: image. Every sequence is one image in raster order."""
    activation: Activation = "squared_relu"
    """Activation of the feed-forward layers; the paper's is squared_relu."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the output of each layer that is dropped in training. Attention weights and embeddings have no
    dropout."""
    cross_attend_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of input positions that no latent sees in a training pass, drawn for each row. The paper uses up to 0.97
    for books."""
    zero_head: bool = True
    """Begin with a head of zeros. The first loss is then exactly log V."""
    cropping: Literal["none", "full_latents", "equal_position_likelihood"] = "full_latents"
    """Scored positions of a training row. full_latents: N consecutive ones at a random place; the ends of a row are
    scored less often. equal_position_likelihood: N consecutive ones at a random place that may extend past either end;
    each position is scored equally often, with fewer targets. none: the last N. (The authors' full_latents_with_prefix
    is full_latents where every byte is a target.)"""
    minimum_crop: int | None = Field(default=None, ge=1)
    """Smallest number of bytes up to the end of a crop, for full_latents. None: N."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        input_width = self.input_width or self.latent_model.width
        if input_width % self.cross_heads:
            raise ValueError(f"cross_heads ({self.cross_heads}) does not divide the inputs' width ({input_width})")
        narrowest_head = min(input_width // self.cross_heads, self.latent_model.width // self.latent_model.heads)
        if self.positions == "rotary" and narrowest_head * self.rotary_fraction < 2:
            raise ValueError(f"rotary_fraction ({self.rotary_fraction}) turns no pair of a head's {narrowest_head}")
        if self.latents > self.sequence_length:
            raise ValueError(f"latents ({self.latents}) are more than sequence_length ({self.sequence_length})")
        layers = self.latent_model.layers
        if any(after not in range(layers) for after in self.cross_attend_after):
            raise ValueError(f"cross_attend_after {list(self.cross_attend_after)} is not among {layers} layers, from 0")
        if self.cross_attend_after != tuple(sorted(set(self.cross_attend_after))):
            raise ValueError(f"cross_attend_after {list(self.cross_attend_after)} does not rise")
        if (self.positions == "image") != (self.image is not None):
            raise ValueError("image and positions: image go together")
        if self.image is not None and math.prod(self.image) != self.sequence_length:
            raise ValueError(
                f"an image of {list(self.image)} has {math.prod(self.image)} bytes, not {self.sequence_length}"
            )
        if self.minimum_crop is not None and self.minimum_crop > self.sequence_length:
            raise ValueError(f"minimum_crop ({self.minimum_crop}) is more than sequence_length")
        if self.minimum_crop is not None and self.cropping != "full_latents":
            raise ValueError("minimum_crop is for cropping: full_latents")
        return self


class PerceiverAR(ByteModel):
    """Perceiver AR: cross-attends, causal blocks over latents, and an untied head."""

    def __init__(self, config: PerceiverARConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.config = config
        self.sequence_length = config.sequence_length
        self.latents = config.latents
        width, self.input_width = config.latent_model.width, config.input_width or config.latent_model.width
        rotary = None
        if config.positions == "rotary":
            rotary = Rotary(config.rotary_fraction, longest_wavelength=config.sequence_length)

        self.embedding = embedding(VOCABULARY + 1, self.input_width)
        tables = [config.sequence_length] if config.positions == "learned" else []
        if config.image is not None:
            height, image_width, channels = config.image
            tables = [image_width + 2, height + 2, channels + 2]  # what image_axes points into
        self.position_tables = nn.ParameterList(torch.empty(length, self.input_width) for length in tables)
        self.to_latents = nn.Linear(self.input_width, width)

        def cross_block() -> CrossBlock:
            attention = CrossAttention(width, self.input_width, config.cross_heads, rotary, bias=True)
            feed_forward = FeedForward(width, config.activation, bias=True)
            return CrossBlock(width, self.input_width, attention, feed_forward, config.dropout)

        def block() -> TransformerBlock:
            attention = Attention(width, config.latent_model.heads, 0.0, rotary, bias=True)
            return TransformerBlock(width, attention, FeedForward(width, config.activation, bias=True), config.dropout)

        self.blocks = nn.ModuleList([cross_block()])
        for layer in range(config.latent_model.layers):
            self.blocks.append(block())
            if layer in config.cross_attend_after:
                self.blocks.append(cross_block())
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY + 1)
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        """Return the authors' choice: weights of variance 1/inputs, tables of deviation 1, biases of 0."""
        if name.endswith("bias") or (name == "head.weight" and self.config.zero_head):
            return Initial()
        module = self.get_submodule(name.rpartition(".")[0])
        cut = 0.8796  # the deviation of a standard normal distribution that is cut at two deviations
        return Initial(module.in_features**-0.5 / cut if isinstance(module, nn.Linear) else 1.0)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the negative log-likelihood of every id; see `ByteModel.forward`.

        Outside training, a padded row is scored at the end of its own ids.
        """
        rows, length = ids.shape
        self.check_length(length)
        ids = ids.long()
        end = self.draw_crop(rows, length)[1] if self.training else ends(ids)
        places = self.place_latents(end.to(ids.device, non_blocking=True), length)
        nats = self.nats(self.read(ids, places), ids.gather(1, places))
        return nats.new_zeros(rows, length).scatter(1, places, nats)

    def place_latents(self, end: Tensor, length: int) -> Tensor:
        """Return the positions of the latents: the last N of a row's first `end`, or its first N if `end` is below N.

        Args:
            end: (rows,) one after the last scored position; at most `length`.
            length: positions of a row.

        Returns:
            (rows, min(N, length))
        """
        count = min(self.latents, length)
        first = (end - count).clamp(min=0)
        return first[:, None] + torch.arange(count, device=end.device)

    def read(self, ids: Tensor, places: Tensor) -> Tensor:
        """Return the hidden states that predict the ids at the latents' positions.

        Args:
            ids: (rows, T); the last id is not read.
            places: (rows, N), from `place_latents`.

        Returns:
            (rows, N, C)
        """
        inputs = self.embed(late(ids), first_position=0)
        z = self.to_latents(inputs.take_along_dim(places[..., None], 1))
        return self.process(z, inputs, places, self.visible(places, inputs))

    def embed(self, inputs: Tensor, first_position: int) -> Tensor:
        """Embed inputs, and add the encoding of their positions if it is not rotary.

        Args:
            inputs: (rows, n) ids or START.
            first_position: position of the first of them.

        Returns:
            (rows, n, W)
        """
        embedded = self.embedding(inputs)
        places = torch.arange(first_position, first_position + inputs.shape[1], device=inputs.device)
        if self.config.positions == "sinusoidal":
            return embedded + sinusoids(places, self.input_width, longest_wavelength=10_000).to(embedded.dtype)
        axes = [places] if self.config.positions == "learned" else []
        if self.config.image is not None:
            axes = image_axes(places, self.config.image)
        for table, index in zip(self.position_tables, axes, strict=True):
            embedded = embedded + table[index]
        return embedded

    def visible(self, places: Tensor, inputs: Tensor) -> Tensor | CausalMask:
        """Return the mask of the latents for `attention`: each sees the inputs up to its own that are not dropped.

        Args:
            places: (rows, N)
            inputs: (rows, T, W)

        Returns:
            The causal mask. If inputs are dropped: (rows, 1, N, T) numbers that are added to the scores of all heads.
        """
        rows, length, _ = inputs.shape
        past = CausalMask(places[:, 0])
        if not self.training or self.config.cross_attend_dropout == 0:
            return past
        dropped = torch.rand(rows, 1, 1, length, device=places.device) < self.config.cross_attend_dropout
        return torch.where(past.booleans(places.shape[1], length), DROPPED * dropped.to(inputs.dtype), float("-inf"))

    def process(
        self,
        z: Tensor,
        inputs: Tensor,
        places: Tensor,
        visible: Tensor | CausalMask | None,
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """Run all blocks and the final norm.

        Args:
            z: (rows, N, C) latents.
            inputs: (rows, M, W)
            places: (rows, N) or (N,) positions of the latents.
            visible: mask of the latents over the inputs, as `attention` takes it.
            caches: one a block, for decoding.

        Returns:
            (rows, N, C)
        """
        for index, block in enumerate(self.blocks):
            cache = caches[index] if caches is not None else None
            reading = (inputs, places, visible) if isinstance(block, CrossBlock) else ()
            z = run_unit(block, z, *reading, cache)
        return self.norm(z)

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """Return the head without the row of START."""
        return self.head.weight[:VOCABULARY], self.head.bias[:VOCABULARY]

    def draw_crop(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Draw where the scored positions of each training row begin and end: (rows,) twice, on the CPU."""
        count = min(self.latents, length)
        if self.config.cropping == "none":
            end = torch.full((rows,), length)
        elif self.config.cropping == "full_latents":
            end = torch.randint(min(self.config.minimum_crop or count, length), length + 1, (rows,))
        else:
            end = torch.randint(1, length + count, (rows,))
        return (end - count).clamp(min=0), end.clamp(max=length)

    def draw_scored(self, rows: int, length: int) -> Tensor:
        """Draw the crop that the next training pass draws; see `ByteModel.draw_scored`."""
        begin, end = self.draw_crop(rows, length)
        places = torch.arange(length)
        return (begin[:, None] <= places) & (places < end[:, None])

    def scored(self, length: int) -> slice:
        """Return the last N positions."""
        return slice(max(0, length - self.latents), length)

    def decoder(self, rows: int) -> "PerceiverARDecoder":
        """Return a new decoder of `rows` rows."""
        return PerceiverARDecoder(self, rows)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; see `ByteModel.flops`."""
        count = min(self.latents, length)
        cross = [block for block in self.blocks if isinstance(block, CrossBlock)]
        weights = linear_weights(self) - self.head.in_features  # START's row is not computed
        of_inputs = sum(block.attention.key_value.weight.numel() for block in cross)
        attention = len(cross) * length * self.input_width
        attention += (len(self.blocks) - len(cross)) * count * self.to_latents.out_features
        return 2 * length * of_inputs + 2 * count * (weights - of_inputs) + 4 * count * attention


class PerceiverARDecoder:
    """Decoder of one latent a byte, over cached keys and values.

    It equals the full forward pass with as many latents as the caches hold. When they hold N, a pass over the cached
    inputs refills them with the last N/2 latents, as in the authors' code. A sliding window of latents would be another
    model than the trained one, because latents would depend on ever older ones. The inputs' keys and values stay.
    """

    def __init__(self, model: PerceiverAR, rows: int) -> None:
        """Make a decoder of `rows` rows with empty caches."""
        self._model = model
        self._inputs = torch.empty(rows, 0, dtype=torch.long, device=model.embedding.weight.device)
        """(rows, n) START and the ids fed so far."""
        self._caches = [LayerCache() for _ in model.blocks]
        self.latents = 0
        """Latents that the caches hold."""

    @property
    def length(self) -> int:
        """Bytes fed so far."""
        return max(0, self._inputs.shape[1] - 1)

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; see `Decoder.prime`."""
        if self._inputs.shape[1]:
            raise ValueError("only a fresh decoder can be primed")
        self._model.check_room(ids.shape[1])
        inputs = F.pad(ids.long(), (1, 0), value=START)
        return self._feed(inputs, min(self._model.latents, inputs.shape[1]))

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        self._model.check_room(self.length + 1)
        if self.latents < self._model.latents:
            return self._feed(ids.long()[:, None], 1)
        for block, cache in zip(self._model.blocks, self._caches, strict=True):
            if not isinstance(block, CrossBlock):
                cache.clear()
        self.latents = 0
        return self._feed(ids.long()[:, None], max(1, self._model.latents // 2))

    def _feed(self, inputs: Tensor, count: int) -> Tensor:
        """Append inputs, and latents at the last `count` positions; return the (rows, VOCABULARY) next logits."""
        model, before = self._model, self._inputs.shape[1]
        self._inputs = torch.cat([self._inputs, inputs], 1)
        length = self._inputs.shape[1]
        z = model.to_latents(model.embed(self._inputs[:, -count:], first_position=length - count))
        places = torch.arange(length - count, length, device=inputs.device)
        visible = None if count == 1 else CausalMask(places[:1].expand(inputs.shape[0]))
        z = model.process(z, model.embed(inputs, before), places, visible, self._caches)
        self.latents += count
        return model.logits(z[:, -1])


def late(ids: Tensor) -> Tensor:
    """Map (rows, T) ids to the inputs that predict them: START, then all ids but the last."""
    return F.pad(ids[:, :-1], (1, 0), value=START)


def ends(ids: Tensor) -> Tensor:
    """Map (rows, T) ids to (rows,): where the padding at a row's end begins."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return torch.where(ids == PADDING, 0, places).amax(1)


def image_axes(places: Tensor, image: tuple[int, int, int]) -> list[Tensor]:
    """Map (n,) input positions to indices into the tables of column, row and channel, (n,) each.

    The indices are those of the authors' code. START has index 1 in each table. A byte with coordinate c has index
    c + 2. Index 0 is their padding's.
    """
    _, width, channels = image
    byte = places - 1
    pixel = byte.div(channels, rounding_mode="floor")
    axes = [pixel % width, pixel.div(width, rounding_mode="floor"), byte % channels]
    return [torch.where(places == 0, 1, axis + 2) for axis in axes]


register_family(
    Family(
        name="perceiver_ar",
        config=PerceiverARConfig,
        build=PerceiverAR,
        free_fields=frozenset({"dropout", "latents", "cross_attend_dropout", "zero_head", "cropping", "minimum_crop"}),
        usage_fields=frozenset({"latents"}),
        small={
            "sequence_length": 32,
            "latents": 16,
            "latent_model": {"width": 32, "layers": 2, "heads": 2},
            "cross_heads": 2,
            "dropout": 0.1,
            "cross_attend_dropout": 0.3,
        },
    )
)
