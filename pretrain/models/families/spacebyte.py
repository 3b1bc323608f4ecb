"""SpaceByte: a Transformer whose larger, global blocks run at the ends of words only.

Slagle 2024, "SpaceByte: Towards Deleting Tokenization from Large Language Modeling", arXiv:2404.14408:

    learned start, ids shifted by one (T, d) ─▶ local blocks, in a window ─┬───────────────────▶ + ─▶ local blocks, head
                                                       where patches start │                     ▲
                                                    zeros in front: (K, D) ▼                     │ last d channels
                                                                           global blocks ────────┘

Position i reads the id before i, and its score depends on the ids before i only. By SpaceByte's rule, a patch starts at
the first byte of a run that is neither a digit, a letter nor a continuation of UTF-8; see `patching`. The
lift to the global width and the drop back have no parameters. Attention crosses documents, as in the paper's code.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import SEPARATOR, VOCABULARY
from pretrain.models.adapters import linear_layers
from pretrain.models.base import ByteModel, units_of
from pretrain.models.blocks.attention import visible_after, window_pairs
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.feed_forward import Activation, FeedForward
from pretrain.models.blocks.multi_byte import MOST_HEADS, PredictsFurther
from pretrain.models.blocks.multi_head import Attention
from pretrain.models.blocks.norms import LayerNorm
from pretrain.models.blocks.positions import Rotary
from pretrain.models.blocks.transformer import StackConfig, TransformerBlock, linear_weights
from pretrain.models.blocks.unit import Unit, run_unit
from pretrain.models.entropy_model import example_of, patcher_of
from pretrain.models.initial import Initial
from pretrain.models.patching.chunks import add_at, chunk_places, gather
from pretrain.models.patching.config import ByteClassConfig, PatcherConfig
from pretrain.models.patching.entropy import Entropy
from pretrain.models.patching.patcher import Patcher, Patches, PatchState
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, ModelSize, register_family


class SpaceByteConfig(PredictsFurther, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """SpaceByte (arXiv:2404.14408)."""

    family: Literal["spacebyte"] = "spacebyte"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence and the longest context."""
    patcher: PatcherConfig = ByteClassConfig()
    """Rule by which patches start. byte_class: SpaceByte's. fixed: every `size` bytes, as in the paper's ablation."""
    patches: int = Field(ge=1)
    """Patches that a row may have. A row with more continues without new ones. The paper has one for six bytes of text,
    and one for eight of code."""
    local_model: StackConfig
    """Local blocks, of width d. The first half reads the bytes, the other half the outputs of patches too."""
    global_model: StackConfig
    """Global blocks, of width D >= d, which read one vector for each patch."""
    window: int | None = Field(default=None, ge=1)
    """Positions that local attention sees: its own and those right before it. The paper has d of them. Null: all."""
    positions: Literal["rotary", "learned", "both"] = "both"
    """Encoding of positions in local blocks, and of patches in global blocks. The paper has both."""
    query_key_norm: bool = True
    """Whether queries and keys have a norm, as in the paper."""
    activation: Activation = "relu"
    """Activation of the feed-forward layers."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention weights and of each layer's output that training drops. The paper has none."""
    parametrization: Literal["standard", "fan_in"] = "standard"
    """Sizes of first values and of learning rates. standard: `initial_std` and one rate for all. fan_in: those of the
    authors' code. Tables have a deviation of 1. Maps have 1 / sqrt(inputs), and as this factor of the learning rate."""
    initial_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights with `parametrization` standard. They are normal, cut at two
    deviations."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.global_model.width < self.local_model.width:
            raise ValueError(
                f"global_model.width ({self.global_model.width}) is less than local_model.width "
                f"({self.local_model.width}); a patch is a vector of the local width with zeros in front"
            )
        return self


class SpaceByte(ByteModel):
    """Transformer with global blocks where patches start."""

    def __init__(self, config: SpaceByteConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        local, wide = config.local_model, config.global_model
        self.sequence_length, self.initial_std = config.sequence_length, config.initial_std
        self.window, self.widths = config.window, (local.width, wide.width)
        self.patcher = patcher_of(config.patcher, config.patches, config.sequence_length, across_documents=True)
        self.rewinds = not isinstance(self.patcher, Entropy)  # its decoder reads positions once
        rotary = None if config.positions == "learned" else Rotary()
        attention = partial(Attention, rotary=rotary, norms=config.query_key_norm)

        def blocks(size: StackConfig, layers: int, window: int | None) -> nn.ModuleList:
            return nn.ModuleList(
                TransformerBlock(
                    size.width,
                    attention(size.width, size.heads, config.dropout, window=window),
                    FeedForward(size.width, config.activation),
                    config.dropout,
                )
                for _ in range(layers)
            )

        self.embedding = embedding(VOCABULARY, local.width)
        self.start = nn.Parameter(torch.empty(local.width))
        self.positions = self.patch_positions = None
        if config.positions != "rotary":
            self.positions = nn.Parameter(torch.empty(config.sequence_length, local.width))
            slots = min(config.patches, config.sequence_length)
            self.patch_positions = nn.Parameter(torch.empty(slots, wide.width))
        self.first_blocks = blocks(local, local.layers // 2, config.window)
        self.global_blocks = blocks(wide, wide.layers, None)
        self.last_blocks = blocks(local, local.layers - local.layers // 2, config.window)
        self.norm = LayerNorm(local.width)
        self.head = nn.Parameter(torch.empty(VOCABULARY, local.width))
        self.multipliers = self._map_sizes() if config.parametrization == "fan_in" else {}
        """Factor of the learning rate of each map by name, and deviation of its first values; {} with one rate."""
        self.initialize()

    def _map_sizes(self) -> dict[str, float]:
        """Return 1 / sqrt(inputs) of each map, by the name of its weight."""
        maps = {f"{name}.weight": layer.in_features for name, layer in linear_layers(self).items()}
        return {name: inputs**-0.5 for name, inputs in {**maps, "head": self.head.shape[1]}.items()}

    def rate_multiplier(self, name: str) -> float:
        """Return the factor of the learning rate of a parameter; see `SpaceByteConfig.parametrization`."""
        return self.multipliers.get(name, 1.0)

    def model_initial(self, name: str) -> Initial:
        """Return a normal distribution; see `SpaceByteConfig.parametrization`."""
        return Initial(self.multipliers.get(name, 1.0) if self.multipliers else self.initial_std)

    def forward(self, ids: Tensor, entropies: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of every id; see `ByteModel.forward`.

        Args:
            ids: (rows, T)
            entropies: (rows, T) entropies of their predictions, for patches by entropy. None: the model of bytes finds
                them, as if each row began a document.
        """
        self.check_length(ids.shape[1])
        before = ids[:, :-1].long()
        x = run_blocks(self.first_blocks, self.embed(before))
        places, used = chunk_places(self.patches(before, entropies).starts, self.patcher.capacity)
        x = add_at(x, places, used, self.patch_outputs(gather(x, places), 0))
        return self.nats(self.norm(run_blocks(self.last_blocks, x)), ids.long())

    def embed(self, before: Tensor) -> Tensor:
        """Map the (rows, n) first ids of rows to what their first n + 1 positions read, (rows, n + 1, d)."""
        x = torch.cat([self.start.expand(len(before), 1, -1), self.embedding(before)], 1)
        return x if self.positions is None else x + self.positions[: x.shape[1]]

    def patches(self, before: Tensor, entropies: Tensor | None = None) -> Patches:
        """Return where patches start among the first n + 1 positions, given the (rows, n) first ids; see `Patcher`."""
        return self.patcher(F.pad(before, (1, 0), value=SEPARATOR), None, entropies)

    def patch_outputs(self, x: Tensor, first: int, caches: list[LayerCache] | None = None) -> Tensor:
        """Map local vectors where patches start to what the global blocks add to them.

        Args:
            x: (rows, k, d)
            first: number of the first of these patches in its row.
            caches: of the global blocks.

        Returns:
            (rows, k, d)
        """
        d, width = self.widths
        x = F.pad(x, (width - d, 0))
        if self.patch_positions is not None:
            x = x + self.patch_positions[first : first + x.shape[1]]
        visible = visible_after(first, x.shape[1], None, x.device)
        return run_blocks(self.global_blocks, x, caches, visible)[..., width - d :]

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the head, which is not tied to the embeddings, without biases."""
        return self.head, None

    def stacks(self) -> dict[str, list[Unit]]:
        """Return the blocks in the order in which they run."""
        return {
            "first": units_of(self.first_blocks),
            "global": units_of(self.global_blocks),
            "last": units_of(self.last_blocks),
        }

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> "SpaceByteDecoder":
        """Return a new decoder of `rows` rows."""
        return SpaceByteDecoder(self, rows)

    def patchers(self) -> dict[str, Patcher]:
        """Return the rule by which patches start."""
        return {"0": self.patcher}

    def empty_example(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return made-up ids, and entropies if the patches depend on stored ones; see `ByteModel.empty_example`."""
        return example_of(self.patcher, *super().empty_example(rows, device))

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; a row counts with all the patches that it may have."""
        return round(self.useful_flops(length, [min(self.patcher.capacity, length)]))

    def useful_flops(self, length: int, patches: Sequence[float]) -> float:
        """Return the operations of a row with so many patches; see `ByteModel.useful_flops`."""
        (d, width), (slots,) = self.widths, patches
        local = len(self.first_blocks) + len(self.last_blocks)
        weights = linear_weights(self.first_blocks) + linear_weights(self.last_blocks)
        return (
            self.patcher.flops(length)
            + 2 * length * (weights + d * VOCABULARY)
            + 4 * local * window_pairs(length, self.window) * d
            + 2 * slots * linear_weights(self.global_blocks)
            + 4 * len(self.global_blocks) * slots * slots * width
        )


def run_blocks(
    blocks: nn.ModuleList, x: Tensor, caches: list[LayerCache] | None = None, visible: Tensor | None = None
) -> Tensor:
    """Map (rows, n, width) to the same shape, block by block; see `Attention.forward`."""
    for index, block in enumerate(blocks):
        x = run_unit(block, x, None if caches is None else caches[index], visible)
    return x


class SpaceByteDecoder:
    """Decoder over caches: of local blocks for all rows together, of global blocks for each row.

    Rows start patches at different times, so each row has as many keys and values as patches of its own.
    """

    def __init__(self, model: SpaceByte, rows: int) -> None:
        """Make a decoder of `rows` rows with empty caches."""
        self.length = 0
        self._model = model
        limit = None if model.window is None else model.window - 1
        self._first = [LayerCache(limit) for _ in model.first_blocks]
        self._last = [LayerCache(limit) for _ in model.last_blocks]
        self._global = [[LayerCache() for _ in model.global_blocks] for _ in range(rows)]
        self._state = PatchState.empty(rows, model.start.device)
        self._before: tuple[PatchState, Tensor] = self._state, torch.empty(0)
        """State before the last call of `feed`, and the (rows, n) ids that it read."""
        self.states = model.start.new_empty(rows, 0, len(model.start))
        """Last hidden states of the last call; see `RewindingDecoder`."""

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; see `Decoder.prime`."""
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        self._model.check_room(ids.shape[1])
        patches = self._model.patches(ids.long())
        self._run(self._model.embed(ids.long()), patches, ids.shape[1])
        self.states = self.states[:, -1:]
        return self._model.logits(self.states[:, -1])

    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        return self.feed(ids[:, None])[:, -1]

    @property
    def most_fed(self) -> int:
        """Return the ids that `feed` takes; see `RewindingDecoder`."""
        return MOST_HEADS if self._model.window is None else min(self._model.window, MOST_HEADS)

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Feed ids in one pass; see `RewindingDecoder.feed`."""
        model, read, count = self._model, ids.long(), ids.shape[1]
        model.check_room(self.length + count)
        x = model.embedding(read)
        if model.positions is not None:
            x = x + model.positions[self.length + 1 : self.length + 1 + count]
        self._before = self._state, read
        self._run(x, model.patcher(read, self._state), count)
        return model.logits(self.states)

    def rewind(self, count: int) -> None:
        """Take back ids; see `RewindingDecoder.rewind`."""
        state, read = self._before
        self._before = state, read[:, : read.shape[1] - count]
        patches, self._state = self._state.patches, self._model.patcher(self._before[1], state).state
        for caches, dropped in zip(self._global, (patches - self._state.patches).tolist(), strict=True):
            for cache in caches:
                cache.rewind(dropped)
        for cache in (*self._first, *self._last):
            cache.rewind(count)
        self.length -= count
        self.states = self.states[:, : self.states.shape[1] - count]

    def _run(self, x: Tensor, patches: Patches, count: int) -> None:
        """Run positions.

        Args:
            x: (rows, n, d) what they read.
            patches: where patches start among them.
            count: ids among what they read.
        """
        model, window = self._model, self._model.window
        self.length += count
        before = self.length + 1 - x.shape[1]
        kept = before if window is None else min(before, window - 1)
        visible = visible_after(kept, x.shape[1], window, x.device)
        first, self._state = self._state.patches.tolist(), patches.state
        x = run_blocks(model.first_blocks, x, self._first, visible)
        for row, caches in enumerate(self._global):
            places = patches.starts[row].nonzero()[:, 0]
            if len(places):
                added = model.patch_outputs(x[row, places][None], first[row], caches)
                x = x.index_put((torch.full_like(places, row), places), added[0], accumulate=True)
        self.states = model.norm(run_blocks(model.last_blocks, x, self._last, visible))


def _of_size(size: ModelSize) -> dict[str, Any]:
    """Return the fields of a SpaceByte with local blocks of half the width."""
    local = size.stack(2) | {"layers": size.layers}
    patches = -(-size.sequence_length // 5)  # the paper has one for six bytes of text
    return {"global_model": size.stack(), "local_model": local, "patches": patches, "window": local["width"]}


register_family(
    Family(
        name="spacebyte",
        reference=REFERENCES / "spacebyte.py",
        config=SpaceByteConfig,
        build=SpaceByte,
        free_fields=frozenset({"dropout", "initial_std", "parametrization", "patcher.model"}),
        of_size=_of_size,
        small={
            "sequence_length": 32,
            "patches": 12,
            "local_model": {"width": 16, "layers": 2, "heads": 2},
            "global_model": {"width": 32, "layers": 2, "heads": 2},
            "window": 8,
            "dropout": 0.1,
        },
    )
)
