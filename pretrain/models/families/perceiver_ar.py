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
positions. Training draws which of the T positions they are: a crop. Linear maps have biases, as in the code. If
attention does not cross documents, a latent sees the inputs and the latents of its document only.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, VOCABULARY
from pretrain.distributed.context import WHOLE_ROWS, Context
from pretrain.models.adapters import whole_weight
from pretrain.models.base import ByteModel
from pretrain.models.blocks.attention import CausalMask, takes_blocks
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.context import set_context
from pretrain.models.blocks.documents import documents_of, visible_in_documents
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation, FeedForward
from pretrain.models.blocks.merged_attention import HIDDEN
from pretrain.models.blocks.multi_byte import PredictsFurther
from pretrain.models.blocks.multi_head import Attention, CrossAttention
from pretrain.models.blocks.norms import LayerNorm
from pretrain.models.blocks.positions import Rotary, sinusoids
from pretrain.models.blocks.transformer import CrossBlock, StackConfig, TransformerBlock, linear_weights
from pretrain.models.blocks.unit import run_unit
from pretrain.models.initial import Initial
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, ModelSize, UsageOption, register_family

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | CausalMask | BlockMask

START = VOCABULARY
"""Input before the first byte. It has a row in the embedding and one in the head, as in the authors' code. It is never
predicted."""
ROOM_DEVIATIONS = 6
"""Standard deviations of the number of kept inputs, above its mean, for which a training pass has room. One row of a
billion has more; its micro-batch then reads all inputs."""
ALIGNED_INPUTS = 8
"""Divisor of the number of kept inputs that a pass has room for; CUDA's fused kernels read masks in such steps."""


class PerceiverARConfig(PredictsFurther, frozen=True, extra="forbid", use_attribute_docstrings=True):
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
    """Latent blocks, from 0, after which a further cross-attend reads the inputs."""
    attention_across_documents: bool = True
    """Whether a latent sees inputs and latents of earlier documents of its row. If not, attention stops at separators.
    Positions do not restart at a document."""
    positions: Literal["rotary", "learned", "sinusoidal", "image"] = "rotary"
    """Encoding of positions. rotary: rotary angles in every attention layer. The others are added to the inputs.
    learned: a learned table. sinusoidal: fixed sines. image: three learned tables, for a byte's column, row and channel
    in an image."""
    rotary_fraction: float = Field(default=0.5, gt=0, le=1)
    """Share of each head's channels that rotary angles turn."""
    image: tuple[int, int, int] | None = None
    """Height, width and channels of the image, for positions: image. Every sequence is one image in raster order."""
    activation: Activation = "squared_relu"
    """Activation of the feed-forward layers. The paper's is squared_relu."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of each layer's output that training drops. Attention weights and embeddings have no dropout."""
    cross_attend_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of input positions that no latent sees in a training pass. It is drawn for each row. A latent that loses
    all its inputs sees them all. The paper uses up to 0.97 for books."""
    z_loss: float = Field(default=0.0, ge=0)
    """Factor of log² Z, which training adds to the loss of each byte. Z is the sum of the exponentials of its logits.
    The term is in the gradient alone; every reported loss is without it. All configurations of the authors have 1e-4.
    """
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


@dataclass(frozen=True)
class KeptInputs:
    """Inputs whose keys and values a training pass computes."""

    places: Tensor
    """(rows, M) positions, rising; T for padding at the end."""
    is_kept: Tensor
    """(rows, M) false for the inputs that only latents see which lose all others."""

    def part(self, context: Context, length: int) -> "KeptInputs":
        """Return this rank's part of them, with more padding so that all ranks have equally many.

        Args:
            context: part of the rows of this rank.
            length: T.
        """
        missing = -self.places.shape[1] % context.size
        places, is_kept = F.pad(self.places, (0, missing), value=length), F.pad(self.is_kept, (0, missing))
        own = context.own(places.shape[1])
        return KeptInputs(places[:, own], is_kept[:, own])

    def to(self, device: torch.device) -> "KeptInputs":
        """Return the same on a device."""
        return KeptInputs(*(x.to(device, non_blocking=True) for x in (self.places, self.is_kept)))


class PerceiverAR(ByteModel):
    """Perceiver AR: cross-attends, causal blocks over latents, and an untied head."""

    def __init__(self, config: PerceiverARConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.config = config
        self.sequence_length = config.sequence_length
        self.attends_across_documents = config.attention_across_documents
        self.latents, self.z_loss = config.latents, config.z_loss
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
        ids = F.pad(ids.long(), (0, -length % self.context.size), value=PADDING)
        if self.training:
            end = self.draw_crop(rows, length)[1]
            kept = self.draw_kept(end, length)
        else:
            end, kept = ends(ids), None
        places = self.place_latents(end.to(ids.device, non_blocking=True), ids.shape[1])
        own = places[:, self.context.own(places.shape[1])]
        nats = self.nats(self.read(ids, places, kept), ids.gather(1, own))
        return nats.new_zeros(ids.shape).scatter(1, own, nats)[:, :length]

    def set_context(self, context: Context) -> None:
        """Set the part of the rows: of the inputs, and of the latents."""
        self.context = context
        set_context(self, context)

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

    def read(self, ids: Tensor, places: Tensor, kept: "KeptInputs | None" = None) -> Tensor:
        """Return the hidden states that predict the ids at the latents' positions.

        Args:
            ids: (rows, T); the last id is not read.
            places: (rows, N), from `place_latents`.
            kept: inputs whose keys and values are computed; None: all.

        Returns:
            (rows, N, C); of this rank's latents if rows are cut.
        """
        before, own = late(ids), places[:, self.context.own(places.shape[1])]
        documents = None if self.attends_across_documents else documents_of(before)
        z = self.to_latents(self.embed(before.gather(1, own), own))
        visible: Mask
        if kept is None and self.context.size == 1:
            input_places = torch.arange(before.shape[1], device=ids.device)
            inputs = self.embed(before, input_places)
            visible = self.visible(places, inputs, documents)
        else:
            kept = (kept or all_inputs(before)).to(ids.device).part(self.context, before.shape[1])
            input_places = kept.places.clamp(max=before.shape[1] - 1)
            inputs = self.embed(before.gather(1, input_places), input_places)
            visible = visible_kept(places, kept, documents, self.context)
            if self.context.size > 1:
                visible = inputs.new_zeros(visible.shape).masked_fill_(visible.logical_not_(), HIDDEN)
        latents_visible = None if documents is None else self.visible_latents(documents.gather(1, places), z)
        return self.process(z, inputs, own, input_places, visible, latents_visible=latents_visible)

    def embed(self, inputs: Tensor, places: Tensor) -> Tensor:
        """Embed inputs, and add the encoding of their positions if it is not rotary.

        Args:
            inputs: (rows, n) ids or START.
            places: (n,) or (rows, n) position of each.

        Returns:
            (rows, n, W)
        """
        embedded = self.embedding(inputs)
        if self.config.positions == "sinusoidal":
            sines = sinusoids(places.flatten(), self.input_width, longest_wavelength=10_000)
            return embedded + sines.to(embedded.dtype).view(*places.shape, -1)
        axes = [places] if self.config.positions == "learned" else []
        if self.config.image is not None:
            axes = image_axes(places, self.config.image)
        for table, index in zip(self.position_tables, axes, strict=True):
            embedded = embedded + table[index]
        return embedded

    def visible(self, places: Tensor, inputs: Tensor, documents: Tensor | None = None) -> "Mask":
        """Return the mask in which each latent sees the inputs up to its own.

        Where FlexAttention is used, it skips the inputs after a crop. torch's fused kernel would multiply them too, and
        each head would read a mask of N T numbers.

        Args:
            places: (rows, N)
            inputs: (rows, T, W)
            documents: (rows, T) document of each input, if a latent sees only its own; None: it sees all.
        """
        if documents is None:
            if not self._takes_blocks(inputs, inputs.shape[1]):
                return CausalMask(places[:, 0])
            documents = torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        return self.visible_inputs(documents.gather(1, places), documents, places[:, 0], inputs)

    def visible_inputs(
        self, of_latents: Tensor, documents: Tensor, first: Tensor, inputs: Tensor
    ) -> "Tensor | BlockMask":
        """Return the mask in which latents see the inputs of their documents up to their own.

        Args:
            of_latents: (rows, N) document of each latent.
            documents: (rows, M) document of each input.
            first: (rows,) position of the first latent among the inputs.
            inputs: (rows, n, W) any of the inputs.
        """
        in_blocks = self._takes_blocks(inputs, documents.shape[1])
        return visible_in_documents(of_latents, documents, first, in_blocks=in_blocks)

    def _takes_blocks(self, inputs: Tensor, count: int) -> bool:
        """Return whether the mask over `count` inputs is a block mask of FlexAttention."""
        return takes_blocks(inputs, self.input_width // self.config.cross_heads, count, dropout=0.0)

    def visible_latents(self, documents: Tensor, z: Tensor) -> "Tensor | BlockMask":
        """Return the mask in which latents see the earlier latents of their documents.

        Args:
            documents: (rows, M) document of each latent that may be seen.
            z: (rows, N, C) the last N of them; this rank's if rows are cut.
        """
        keys, count = documents.shape[1], z.shape[1]
        before = self.context.first(count) if self.context.cuts_positions else keys - count
        size = self.config.latent_model
        in_blocks = takes_blocks(z, size.width // size.heads, keys, dropout=0.0)
        first = documents.new_full((len(z),), before)
        return visible_in_documents(documents[:, before : before + count], documents, first, in_blocks=in_blocks)

    def process(
        self,
        z: Tensor,
        inputs: Tensor,
        places: Tensor,
        input_places: Tensor,
        visible: "Mask | None",
        caches: list[LayerCache] | None = None,
        latents_visible: "Tensor | BlockMask | None" = None,
    ) -> Tensor:
        """Run all blocks and the final norm.

        Args:
            z: (rows, N, C) latents.
            inputs: (rows, M, W)
            places: (rows, N) or (N,) positions of the latents.
            input_places: (rows, M) or (M,) positions of the inputs.
            visible: mask of the latents over the inputs, as `attention` takes it.
            caches: one a block, for decoding.
            latents_visible: mask of the latents over the cached latents and these; None: all before.

        Returns:
            (rows, N, C)
        """
        within = () if latents_visible is None else (latents_visible,)
        for index, block in enumerate(self.blocks):
            cache = caches[index] if caches is not None else None
            if isinstance(block, CrossBlock):
                z = run_unit(block, z, inputs, places, input_places, visible, cache)
            else:
                z = run_unit(block, z, cache, *within)
        return self.norm(z)

    def head_weights(self) -> tuple[Tensor, Tensor]:
        """Return the head without the row of START."""
        return whole_weight(self.head)[:VOCABULARY], self.head.bias[:VOCABULARY]

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

    def draw_kept(self, end: Tensor, length: int) -> "KeptInputs | None":
        """Draw the inputs of a training pass that are not dropped, on the CPU, which thus knows their number.

        The others of the inputs that are selected are for latents that lose all inputs of their document. If attention
        stops at separators, all inputs from the last one kept before the latents are selected, because the CPU does not
        know where documents begin.

        Args:
            end: (rows,) from `draw_crop`.
            length: positions of a row.

        Returns:
            The inputs; None if no input is dropped.
        """
        share = self.config.cross_attend_dropout
        if not share:
            return None
        kept = torch.rand(len(end), length) >= share
        latents, places = self.place_latents(end, length), torch.arange(length)
        first, last = latents[:, :1], latents[:, -1:]
        last_kept = torch.where(kept & (places <= first), places, -1).amax(1, keepdim=True)
        lost = (last_kept < 0) & (kept.cumsum(1) == 0) if self.attends_across_documents else places > last_kept
        selected = (kept | lost) & (places <= last)
        room = self.read_inputs(length)
        if int(selected.sum(1).max()) > room:
            room = length
        rows, columns = selected.nonzero(as_tuple=True)
        numbers = selected.cumsum(1)[rows, columns] - 1
        chosen = torch.full((len(end), room), length)
        chosen[rows, numbers] = columns
        is_kept = torch.zeros(len(end), room, dtype=torch.bool)
        is_kept[rows, numbers] = kept[rows, columns]
        return KeptInputs(chosen, is_kept)

    def read_inputs(self, length: int) -> int:
        """Return the inputs of a row whose keys and values a pass computes: in training, those it has room for."""
        share = self.config.cross_attend_dropout if self.training else 0.0
        mean = length * (1 - share)
        room = math.ceil(mean + ROOM_DEVIATIONS * math.sqrt(mean * share))
        if share and not self.attends_across_documents:
            room += self.latents
        return min(length, -(-room // ALIGNED_INPUTS) * ALIGNED_INPUTS)

    def scored(self, length: int) -> slice:
        """Return the last N positions."""
        return slice(max(0, length - self.latents), length)

    def decoder(self, rows: int) -> "PerceiverARDecoder":
        """Return a new decoder of `rows` rows."""
        return PerceiverARDecoder(self, rows)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; see `ByteModel.flops`."""
        count, read = min(self.latents, length), self.read_inputs(length)
        cross = [block for block in self.blocks if isinstance(block, CrossBlock)]
        weights = linear_weights(self) - self.head.in_features  # START's row is not computed
        of_inputs = sum(block.attention.key_value.weight.numel() for block in cross)
        attention = len(cross) * read * self.input_width
        attention += (len(self.blocks) - len(cross)) * count * self.to_latents.out_features
        return 2 * read * of_inputs + 2 * count * (weights - of_inputs) + 4 * count * attention


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
        places = torch.arange(length - count, length, device=inputs.device)
        z = model.to_latents(model.embed(self._inputs[:, -count:], places))
        input_places = torch.arange(before, length, device=inputs.device)
        embedded = model.embed(inputs, input_places)
        first = places[:1].expand(inputs.shape[0])
        self.latents += count
        if model.attends_across_documents:
            visible = None if count == 1 else CausalMask(first)
            return model.logits(model.process(z, embedded, places, input_places, visible, self._caches)[:, -1])
        documents = documents_of(self._inputs)
        seen = model.visible_inputs(documents[:, -count:], documents, first, embedded)
        latents_seen = model.visible_latents(documents[:, -self.latents :], z)
        states = model.process(z, embedded, places, input_places, seen, self._caches, latents_seen)
        return model.logits(states[:, -1])


def all_inputs(before: Tensor) -> KeptInputs:
    """Return all (rows, T) inputs as kept ones."""
    places = torch.arange(before.shape[1], device=before.device).expand_as(before)
    return KeptInputs(places, torch.ones_like(places, dtype=torch.bool))


def visible_kept(places: Tensor, kept: KeptInputs, documents: Tensor | None, context: Context = WHOLE_ROWS) -> Tensor:
    """Return the mask in which a latent sees the kept inputs up to its own, or all up to its own if none is kept.

    Args:
        places: (rows, N) positions of the latents.
        kept: M inputs.
        documents: (rows, T) document of each input, if a latent sees only its own; None: it sees all.
        context: part of the rows of this rank; the others have other inputs.

    Returns:
        (rows, 1, N, M) booleans.
    """
    past = kept.places[:, None] <= places[..., None]
    if documents is not None:
        of_inputs = documents.gather(1, kept.places.clamp(max=documents.shape[1] - 1))
        past = past & (of_inputs[:, None] == documents.gather(1, places)[..., None])
    seen = past & kept.is_kept[:, None]
    sees_none = context.sum(seen.any(-1, keepdim=True).int()) == 0
    return seen.logical_or_(past.logical_and_(sees_none))[:, None]


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


def _of_size(size: ModelSize) -> dict[str, Any]:
    """Return the fields of a Perceiver AR with a latent for four bytes."""
    wide = size.stack()
    latents = max(1, size.sequence_length // 4)
    return {"latent_model": wide, "cross_heads": wide["heads"], "latents": latents, "cross_attend_dropout": 0.0}


register_family(
    Family(
        name="perceiver_ar",
        reference=REFERENCES / "perceiver_ar.py",
        config=PerceiverARConfig,
        build=PerceiverAR,
        row_parts=lambda config: math.gcd(config.sequence_length, config.latents),
        free_fields=frozenset({"dropout", "cross_attend_dropout", "z_loss", "zero_head", "cropping", "minimum_crop"}),
        usage_options=(UsageOption("latents", "latents", "Number of latents. More are more accurate and slower."),),
        image_of=lambda config: config.image,
        of_size=_of_size,
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
