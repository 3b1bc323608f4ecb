"""Byte Latent Transformer (BLT): a Transformer over patches, between local models that exchange vectors with it.

Pagnoni et al. 2024, "Byte Latent Transformer: Patches Scale Better Than Tokens", arXiv:2412.09871:

    ids shifted by one, n-grams ─▶ encoder blocks (T, d) ─┬──────────────▶ decoder blocks, head
                                                          │ slots attend   ▲ positions attend
                                       K patches, k slots ▼ to positions   │ to slots
                                              (K, k d ─▶ D) ─▶ global blocks ─▶ (K, k d)

Position i reads the id before i, and its score depends on the ids before i only. Patch number j has the positions
after the start of patch j - 1, up to and including its own start. Positions from that start on, until the next one,
attend to its slots. See `patching` for the rules by which patches start.

Attention is masked by document, as in the authors' code, and so are n-grams and the positions of a patch.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import SEPARATOR, VOCABULARY
from pretrain.models.base import ByteModel, units_of
from pretrain.models.blocks.attention import takes_blocks, window_pairs
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.documents import documents_of, visible_in_documents, visible_in_window
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation, FeedForward
from pretrain.models.blocks.hash_ngrams import HashNgrams, NgramConfig
from pretrain.models.blocks.multi_byte import PredictsFurther
from pretrain.models.blocks.multi_head import Attention
from pretrain.models.blocks.norms import RMSNorm
from pretrain.models.blocks.positions import Rotary
from pretrain.models.blocks.transformer import StackConfig, TransformerBlock, linear_weights
from pretrain.models.blocks.unit import Unit, run_unit
from pretrain.models.entropy_model import example_of, patcher_of
from pretrain.models.initial import Initial
from pretrain.models.patching.chunks import chunk_places
from pretrain.models.patching.config import ByteClassConfig, PatcherConfig
from pretrain.models.patching.cross_attention import PatchAttention, Pooling, ReadingBlock, SlotBlock, pool, spread
from pretrain.models.patching.patcher import Patcher, Patches, PatchState
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, ModelSize, register_family

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class LocalConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Size of the blocks that read bytes."""

    width: int = Field(ge=1)
    """Channels of the residual stream, and of a slot."""
    heads: int = Field(ge=1)
    """Attention heads of all layers, attention to slots among them; divides the width."""
    encoder_layers: int = Field(ge=1)
    """Blocks before the patches."""
    decoder_layers: int = Field(ge=1)
    """Blocks after the patches."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) does not divide width ({self.width})")
        return self


class BLTConfig(PredictsFurther, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Byte Latent Transformer (arXiv:2412.09871)."""

    family: Literal["blt"] = "blt"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence and the longest context."""
    patcher: PatcherConfig = ByteClassConfig()
    """Rule by which patches start. entropy: the paper's. byte_class: its patches by spaces. fixed: every `size`
    bytes."""
    patches: int = Field(ge=1)
    """Patches that a row may have. A row with more continues without new ones."""
    local_model: LocalConfig
    """Blocks of width d, which read bytes: the encoder before the patches, the decoder after them."""
    global_model: StackConfig
    """Blocks of width D, which read one vector for each patch."""
    window: int | None = Field(default=512, ge=1)
    """Positions that local attention sees: its own and those right before it. Null: all."""
    ngrams: NgramConfig | None = NgramConfig()
    """Hash n-grams whose vectors are added to those of bytes. Null: none."""
    slots: int = Field(default=2, ge=1)
    """Vectors of width d that a patch has in attention between positions and patches. The paper's 8B model has 4."""
    pooling: Pooling | Literal["none"] = "max"
    """Operation over the positions of a patch that gives the first vectors of its slots. none: learned vectors that all
    patches share, an ablation of the paper."""
    encoder_attention: Literal["none", "last", "all"] = "last"
    """Encoder blocks after which slots attend to positions. none: the pooled vectors are the patches."""
    decoder_attention: Literal["none", "first", "all"] = "all"
    """Decoder blocks before which positions attend to slots. none: a vector of the patch is added to its positions."""
    cross_residual: Literal[1, 2] = 1
    """Factor of the input in attention between positions and slots. The output is added to it. 1: the paper's
    equations. 2: the released code and weights."""
    attention_across_documents: bool = False
    """True: a byte sees earlier documents of its row. In the paper it does not. Separators end documents."""
    rotary_base: float = Field(default=500_000.0, gt=1)
    """Base of the rotary angles. The paper has 500,000, and the authors' code 10,000 by default."""
    activation: Activation = "swiglu"
    """Activation of the feed-forward layers."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention weights and of each layer's output that training drops. The paper has none."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights. They are normal, cut at two deviations."""

    @model_validator(mode="after")
    def _patches_read_positions(self) -> Self:
        if self.pooling == "none" and self.encoder_attention == "none":
            raise ValueError("pooling none needs encoder_attention last or all; else patches would read no position")
        return self


class Members(NamedTuple):
    """Patches of rows, as positions belong to them."""

    slots: int
    """K: patches that a row may have here."""
    own: Tensor
    """(rows, n) patch whose slots attend to each position; K: none of them."""
    documents: Tensor | None
    """(rows, K) document of each patch; None if positions see all documents."""


class BLT(ByteModel):
    """Transformer over patches, with attention between positions and patches."""

    def __init__(self, config: BLTConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.config, local, wide = config, config.local_model, config.global_model
        d, width = local.width, wide.width
        self.sequence_length, self.initial_std = config.sequence_length, config.initial_std
        self.attends_across_documents = config.attention_across_documents
        self.window = config.window
        across = config.attention_across_documents
        self.patcher = patcher_of(config.patcher, config.patches, config.sequence_length, across_documents=across)

        def parts(size: StackConfig | LocalConfig, window: int | None) -> tuple[int, Attention, FeedForward, float]:
            rotary = Rotary.of_base(config.rotary_base, size.width // size.heads)
            attention = Attention(size.width, size.heads, config.dropout, rotary, window)
            return size.width, attention, FeedForward(size.width, config.activation), config.dropout

        exchange = partial(PatchAttention, d, local.heads, config.cross_residual, config.dropout)
        writes, reads = config.encoder_attention != "none", config.decoder_attention != "none"
        self.embedding = embedding(VOCABULARY, d)
        self.ngrams = None
        if config.ngrams is not None:
            self.ngrams = HashNgrams(config.ngrams, d, across_documents=config.attention_across_documents)
        self.encoder_blocks = nn.ModuleList(
            TransformerBlock(*parts(local, config.window), RMSNorm) for _ in range(local.encoder_layers)
        )
        self.first_slots = self.shared_slots = None
        if config.pooling == "none":
            self.shared_slots = nn.Parameter(torch.empty(config.slots, d))
        elif writes:
            self.first_slots = nn.Linear(d, config.slots * d, bias=False)
        self.slot_blocks = nn.ModuleList(
            SlotBlock(d, local.heads, config.cross_residual, config.dropout)
            for _ in range({"none": 0, "last": 1, "all": local.encoder_layers}[config.encoder_attention])
        )
        inputs = config.slots * d if writes else d
        self.patch_input = nn.Linear(inputs, width, bias=False) if inputs != width else nn.Identity()
        self.global_blocks = nn.ModuleList(TransformerBlock(*parts(wide, None), RMSNorm) for _ in range(wide.layers))
        self.patch_output = nn.Linear(width, config.slots * d if reads else d, bias=False)
        reading = {"none": 0, "first": 1, "all": local.decoder_layers}[config.decoder_attention]
        self.decoder_blocks = nn.ModuleList(
            ReadingBlock(*parts(local, config.window), exchange())
            if layer < reading
            else TransformerBlock(*parts(local, config.window), RMSNorm)
            for layer in range(local.decoder_layers)
        )
        self.norm = RMSNorm(d)
        self.head = nn.Parameter(torch.empty(VOCABULARY, d))
        self.initialize()

    def model_initial(self, name: str) -> Initial:
        """Return a normal distribution with the deviation of the config."""
        return Initial(self.initial_std)

    def forward(self, ids: Tensor, entropies: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of every id; see `ByteModel.forward`.

        Args:
            ids: (rows, T)
            entropies: (rows, T) entropies of their predictions, for patches by entropy. None: the model of bytes finds
                them, as if each row began a document.
        """
        self.check_length(ids.shape[1])
        read = F.pad(ids[:, :-1].long(), (1, 0), value=SEPARATOR)
        starts = self.patcher(read, None, entropies).starts
        documents = self.documents(read)
        visible = self.visible(documents, read.shape[1])
        states = self.encode(self.embed(read, read), None, visible)
        members = self.members(starts, self.patcher.capacity, documents)
        slots = self.patch_outputs(self.patch_inputs(states, members), members.documents)
        x = self.decode(states[-1], slots, starts.cumsum(1) - 1, None, visible)
        return self.nats(self.norm(x), ids.long())

    def embed(self, read: Tensor, context: Tensor) -> Tensor:
        """Map (rows, n) ids that positions read to (rows, n, d).

        Args:
            read: the ids.
            context: (rows, m) these ids, after those before them that n-grams contain.
        """
        x: Tensor = self.embedding(read)
        return x if self.ngrams is None else self.ngrams(x, context)

    def documents(self, read: Tensor) -> Tensor | None:
        """Return the (rows, n) document of each position; None if positions see all documents."""
        return None if self.attends_across_documents else documents_of(read)

    def visible(self, documents: Tensor | None, count: int) -> "Tensor | BlockMask | None":
        """Return the mask of local attention at the last `count` of (rows, n) positions, given their documents."""
        if documents is None:
            return None
        if self.window is not None and count > self.window:
            return visible_in_window(documents, self.window)
        return self._visible_in(documents, count, self.config.local_model)

    def _visible_in(self, documents: Tensor, count: int, size: StackConfig | LocalConfig) -> "Tensor | BlockMask":
        keys, dropout = documents.shape[1], self.config.dropout if self.training else 0.0
        in_blocks = takes_blocks(self.head, size.width // size.heads, keys, dropout)
        first = documents.new_full((len(documents),), keys - count)
        return visible_in_documents(documents[:, keys - count :], documents, first, in_blocks=in_blocks)

    def members(self, starts: Tensor, slots: int, documents: Tensor | None) -> Members:
        """Return the patches of rows, given where patches start.

        Args:
            starts: (rows, n) booleans.
            slots: patches that a row may have.
            documents: (rows, n) document of each position; None if positions see all documents.
        """
        own, slots = starts.cumsum(1) - starts.long(), min(slots, starts.shape[1])
        if documents is None:
            return Members(slots, own, None)
        places, used = chunk_places(starts, slots)
        of_slots = documents.gather(1, places).where(used, documents[:, -1:])
        closed = own.clamp(max=slots - 1)
        alike = of_slots.gather(1, closed) == documents  # the end of a document is in no patch of the next one
        return Members(slots, own.where(alike, slots), of_slots)

    def encode(self, x: Tensor, caches: list[LayerCache] | None, visible: "Tensor | BlockMask | None") -> list[Tensor]:
        """Return the (rows, n, d) outputs of the encoder blocks that slots attend to, the last one among them."""
        states = []
        for index, block in enumerate(self.encoder_blocks):
            x = run_unit(block, x, None if caches is None else caches[index], visible)
            states.append(x)
        return states if self.config.encoder_attention == "all" else states[-1:]

    def patch_inputs(self, states: list[Tensor], members: Members) -> Tensor:
        """Map encoder states to (rows, K, D) inputs of the global blocks."""
        if self.shared_slots is None:
            assert self.config.pooling != "none"
            x = pool(states[0], members.own, members.slots, self.config.pooling)
            x = x if self.first_slots is None else self.first_slots(x)
        else:
            x = states[0].new_zeros(len(states[0]), members.slots, 1) + self.shared_slots.flatten()
        for block, read in zip(self.slot_blocks, states, strict=False):  # none reads them without attention to slots
            x = run_unit(block, x.unflatten(2, (self.config.slots, -1)), read, members.own).flatten(2)
        inputs: Tensor = self.patch_input(x)
        return inputs

    def patch_outputs(self, x: Tensor, documents: Tensor | None, caches: list[LayerCache] | None = None) -> Tensor:
        """Map patches to what the decoder reads of them.

        Args:
            x: (rows, n, D) patches.
            documents: (rows, K) document of each patch, of the cached ones too; None if positions see all documents.
            caches: of the global blocks.

        Returns:
            (rows, n, k, d); k is 1 without attention to slots.
        """
        visible = None if documents is None else self._visible_in(documents, x.shape[1], self.config.global_model)
        for index, block in enumerate(self.global_blocks):
            x = run_unit(block, x, None if caches is None else caches[index], visible)
        slots: Tensor = self.patch_output(x).unflatten(2, (-1, self.config.local_model.width))
        return slots

    def decode(
        self,
        x: Tensor,
        slots: Tensor,
        newest: Tensor,
        caches: list[LayerCache] | None,
        visible: "Tensor | BlockMask | None",
    ) -> Tensor:
        """Map encoder states to last hidden states.

        Args:
            x: (rows, n, d) states.
            slots: (rows, K, k, d) what `patch_outputs` returns.
            newest: (rows, n) newest patch that each position may use.
            caches: of the decoder blocks.
            visible: mask of local attention.

        Returns:
            (rows, n, d)
        """
        if self.config.decoder_attention == "none":
            x = x + spread(slots.squeeze(2), newest)
        for index, block in enumerate(self.decoder_blocks):
            shared = (visible, slots, newest) if isinstance(block, ReadingBlock) else (visible,)
            x = run_unit(block, x, None if caches is None else caches[index], *shared)
        return x

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the head, which is not tied to the embeddings, without biases."""
        return self.head, None

    def stacks(self) -> dict[str, list[Unit]]:
        """Return the blocks in the order in which they run, apart from those of slots, which may be in between."""
        return {
            "encoder": units_of(self.encoder_blocks),
            "slots": units_of(self.slot_blocks),
            "global": units_of(self.global_blocks),
            "decoder": units_of(self.decoder_blocks),
        }

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> "BLTDecoder":
        """Return a new decoder of `rows` rows."""
        return BLTDecoder(self, rows)

    def patchers(self) -> dict[str, Patcher]:
        """Return the rule by which patches start."""
        return {"0": self.patcher}

    def empty_example(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return made-up ids, and entropies if the patches depend on stored ones; see `ByteModel.empty_example`."""
        return example_of(self.patcher, *super().empty_example(rows, device))

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; a row counts with all the patches that it may have.

        The sums of attention between positions and slots are no matrix products: each position has 4 k d operations
        for a layer, in the encoder and in the decoder.
        """
        return round(self.useful_flops(length, [min(self.patcher.capacity, length)]))

    def useful_flops(self, length: int, patches: Sequence[float]) -> float:
        """Return the operations of a row with so many patches; see `ByteModel.useful_flops`."""
        config, (count,) = self.config, patches
        d, width, local = config.local_model.width, config.global_model.width, config.local_model
        layers = local.encoder_layers + local.decoder_layers
        reading = [block.reading for block in self.decoder_blocks if isinstance(block, ReadingBlock)]
        by_slots = sum(linear_weights(layer.key_value) for layer in reading)
        by_positions = linear_weights(self.encoder_blocks) + linear_weights(self.decoder_blocks) - by_slots
        of_slots = linear_weights(self.slot_blocks)
        by_patches = linear_weights(self.patch_input) + linear_weights(self.patch_output)
        if self.first_slots is not None:
            by_patches += linear_weights(self.first_slots)
        return (
            self.patcher.flops(length)
            + 2 * length * (by_positions + of_slots // 2 + d * VOCABULARY)
            + 4 * layers * window_pairs(length, self.window) * d
            + 2 * count * config.slots * (of_slots // 2 + by_slots)
            + 2 * count * (by_patches + linear_weights(self.global_blocks))
            + 4 * len(self.global_blocks) * count * count * width
        )


class BLTDecoder:
    """Decoder over caches: of local blocks for all rows together, of global blocks for each row.

    Rows start patches at different times. Each row keeps the encoder states of its open patch.
    """

    def __init__(self, model: BLT, rows: int) -> None:
        """Make a decoder of `rows` rows with empty caches."""
        self.length = 0
        self._model = model
        device, config = model.head.device, model.config
        limit = None if model.window is None else model.window - 1
        self._encoder = [LayerCache(limit) for _ in model.encoder_blocks]
        self._decoder = [LayerCache(limit) for _ in model.decoder_blocks]
        self._global = [[LayerCache() for _ in model.global_blocks] for _ in range(rows)]
        self._state = PatchState.empty(rows, device)
        self._read = torch.zeros(rows, 0, dtype=torch.long, device=device)
        """(rows, n) last ids that were read, as many as n-grams contain."""
        self._documents = torch.zeros(rows, 0, dtype=torch.long, device=device)
        """(rows, n) document of every position whose keys are cached."""
        self._patch_documents = [self._documents[:1]] * rows
        """For each row, (1, K) document of every patch."""
        slots = 1 if config.decoder_attention == "none" else config.slots
        self._slots = model.head.new_zeros(rows, slots, config.local_model.width)
        """(rows, k, d) newest patch of each row, as the decoder reads it."""
        states = config.local_model.encoder_layers if config.encoder_attention == "all" else 1
        self._open = [[model.head.new_zeros(1, 0, config.local_model.width)] * states for _ in range(rows)]
        """For each row, (1, n, d) encoder states of the positions after its newest patch."""
        self._open_documents = [self._documents[:1]] * rows

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; see `Decoder.prime`."""
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        self._model.check_room(ids.shape[1])
        self.length = ids.shape[1]
        return self._feed(F.pad(ids.long(), (1, 0), value=SEPARATOR))

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        self._model.check_room(self.length + 1)
        self.length += 1
        return self._feed(ids.long()[:, None])

    def _feed(self, read: Tensor) -> Tensor:
        """Return the logits after positions that read (rows, n) ids."""
        model = self._model
        patches: Patches = model.patcher(read, self._state)
        self._state = patches.state
        context = torch.cat([self._read, read], 1)
        kept = 0 if model.config.ngrams is None else max(model.config.ngrams.sizes) - 1
        self._read = context[:, max(context.shape[1] - kept, 0) :]
        documents = self._advance(read)
        visible = model.visible(documents, read.shape[1])
        states = model.encode(model.embed(read, context), self._encoder, visible)
        own = None if documents is None else documents[:, documents.shape[1] - read.shape[1] :]
        slots, newest = self._patches(states, patches.starts, own)
        x = model.decode(states[-1], slots, newest, self._decoder, visible)
        return model.logits(model.norm(x[:, -1]))

    def _advance(self, read: Tensor) -> Tensor | None:
        """Return the documents of cached positions and of these; None if positions see all documents."""
        model = self._model
        if model.attends_across_documents:
            return None
        before = self._documents[:, -1:] if self._documents.shape[1] else read.new_zeros(len(read), 1)
        documents = torch.cat([self._documents, before + documents_of(read)], 1)
        if model.window is not None:
            documents = documents[:, -max(model.window, read.shape[1]) :]
        self._documents = documents
        return documents

    def _patches(self, states: list[Tensor], starts: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the slots of the newest patch of each row and of those that start now, and each position's patch.

        Args:
            states: (rows, n, d) encoder states; see `BLT.encode`.
            starts: (rows, n) where patches start.
            documents: (rows, n) document of each position.

        Returns:
            (rows, K, k, d) and (rows, n).
        """
        counts = starts.sum(1).tolist()
        slots = self._slots[:, None].repeat(1, 1 + max(counts), 1, 1)
        for row, count in enumerate(counts):
            own = None if documents is None else documents[row : row + 1]
            ended = self._end_patches(row, count, [x[row : row + 1] for x in states], starts[row : row + 1], own)
            if ended is not None:
                slots[row, 1 : 1 + count] = ended
                self._slots[row] = ended[-1]
        return slots, starts.cumsum(1)

    def _end_patches(
        self, row: int, count: int, states: list[Tensor], starts: Tensor, documents: Tensor | None
    ) -> Tensor | None:
        """Add positions to the open patch of a row, and return the slots of its patches that end there, (K, k, d)."""
        model, before = self._model, self._open[row][0].shape[1]
        states = [torch.cat([kept, x], 1) for kept, x in zip(self._open[row], states, strict=True)]
        starts = F.pad(starts, (before, 0))
        if documents is not None:
            documents = torch.cat([self._open_documents[row], documents], 1)
        last = int(starts[0].nonzero()[-1]) + 1 if count else 0
        is_full = int(self._state.patches[row]) >= model.patcher.capacity  # no later patch reads these states
        rest = states[0].shape[1] if is_full else last
        self._open[row] = [x[:, rest:] for x in states]
        if documents is not None:
            self._open_documents[row] = documents[:, rest:]
        if not count:
            return None
        members = model.members(starts, count, documents)
        of_patches = None
        if members.documents is not None:
            of_patches = torch.cat([self._patch_documents[row], members.documents], 1)
            self._patch_documents[row] = of_patches
        return model.patch_outputs(model.patch_inputs(states, members), of_patches, self._global[row])[0]


def _of_size(size: ModelSize) -> dict[str, Any]:
    """Return the fields of a BLT with local blocks of half the width."""
    size = size._replace(width=max(128, size.width // 128 * 128))  # two slots of half the width are a patch
    local = size.stack(2)
    layers = {"encoder_layers": 1, "decoder_layers": max(1, size.layers // 3)}
    return {
        "global_model": size.stack(),
        "local_model": {"width": local["width"], "heads": local["heads"], **layers},
        "patches": -(-size.sequence_length // 4),
        "ngrams": {"buckets": 16 * size.width},
    }


register_family(
    Family(
        name="blt",
        reference=REFERENCES / "blt.py",
        config=BLTConfig,
        build=BLT,
        free_fields=frozenset({"dropout", "initial_std", "patcher.model"}),
        of_size=_of_size,
        small={
            "sequence_length": 32,
            "patches": 32,
            "local_model": {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 2},
            "global_model": {"width": 24, "layers": 2, "heads": 2},
            "window": 8,
            "ngrams": {"sizes": (3, 4), "buckets": 64},
            "dropout": 0.1,
        },
    )
)
