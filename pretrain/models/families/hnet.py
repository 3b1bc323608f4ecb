"""H-Net: networks within networks, over fewer and fewer learned patches.

Hwang, Wang and Gu 2025, "Dynamic Chunking for End-to-End Hierarchical Sequence Modeling", arXiv:2507.07955. A stage:

    (n, d) ─▶ encoder ─┬─▶ router: where do patches start? ──┐ probabilities
                       ├─▶ linear map ───────────────────────┼──────────────────────────────▶ + ─▶ decoder ─▶ (n, d)
                       └─▶ states where patches start, with a learned pad: (k, D)            ▲
                            ─▶ the next stage, or the main stack ─▶ first d channels, smoothed over patches, at
                               every position of the patch

Stages nest: the patches of one are the positions of the next, so fixed patches in two stages make a hierarchy of three
levels. Each encoder, decoder and main stack ends with a norm. Position i reads the id before i, and its score depends
on the ids before i only. States and attention cross documents, as in the authors' code.

A stage may join patches and positions as AU-Net does (Videau et al. 2025, "From Bytes to Ideas: Language Modeling with
Autoregressive U-Nets", arXiv:2506.14761):

    (n, d) ─▶ encoder ─┬─────────────────────────────────────────────────────────────────────▶ + ─▶ decoder ─▶ (n, d)
                       └─▶ states where patches start, norm, linear map: (k, D)              ▲
                            ─▶ the next stage, or the main stack ─▶ a linear map, and one for each place in the patch

Every stage has room for a constant number of patches, so shapes are static. A row that has used its patches continues
without new ones.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.models.base import ByteModel, units_of
from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.layout import (
    Cache,
    Layout,
    LayoutConfig,
    LayoutStack,
    MambaSizes,
    RotaryConfig,
    additions,
)
from pretrain.models.blocks.mamba2 import TAPS
from pretrain.models.blocks.multi_byte import PredictsFurther
from pretrain.models.blocks.transformer import linear_weights
from pretrain.models.blocks.unit import Unit
from pretrain.models.initial import FIRST_VALUES, Initial
from pretrain.models.patching.chunks import chunk_places, gather
from pretrain.models.patching.config import ByteClassConfig, FixedConfig, build_patcher
from pretrain.models.patching.cross_attention import pool
from pretrain.models.patching.multi_linear import MultiLinear
from pretrain.models.patching.patcher import Patcher, Patches, PatchState
from pretrain.models.patching.router import ExactLinear, LearnedConfig, Router, smooth
from pretrain.models.references import FOLDER as REFERENCES
from pretrain.models.registry import Family, ModelSize, register_family

BYTES_PER_TOKEN = 4.6
"""Mean bytes of a token of GPT-2, in the paper's rule for learning rates."""
BYTES_PER_WORD = 6.0
"""Mean bytes of a patch of the byte classes in English text, for the same rule."""
StagePatcher = Annotated[ByteClassConfig | FixedConfig | LearnedConfig, Field(discriminator="name")]
"""Rule by which the patches of a stage start."""


class StageConfig(LayoutConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A stage: an encoder and a decoder around the network over its patches."""

    encoder: Layout
    """Blocks before patches, such as T1m4. m is Mamba-2, t is attention; M and T have a feed-forward layer too."""
    decoder: Layout
    """Blocks after patches."""
    window: int | None = Field(default=None, ge=1)
    """Positions that attention sees: its own and those right before it. The authors have 1,024. Null: all."""
    patcher: StagePatcher
    """Rule by which patches start. learned: H-Net's router. fixed: every `size` positions. byte_class: SpaceByte's
    rule, in the first stage only."""
    patches: int = Field(ge=1)
    """Patches that a row may have. A row with more continues without new ones. An untrained router starts one at about
    half of all positions."""
    downsampling: Literal["select", "max", "mean"] = "select"
    """Vector of a patch. select: the state where it starts. max and mean: over the states after the start of the patch
    before, up to its own, the paper's ablations (appendix E.1)."""
    join: Literal["padded", "multi_linear"] = "padded"
    """How the network over patches reads states, and how positions get its outputs. padded: H-Net's. Patches have more
    channels, and a linear map of the states is added. multi_linear: AU-Net's. A norm and a linear map lead to patches.
    Linear maps of their outputs are added to the states, one of them for each place in a patch."""
    places: int = Field(default=16, ge=1)
    """Places in a patch that have a linear map of their own with `join` multi_linear. Later places begin again with the
    first map. 1: all places have the same map."""

    @property
    def positions_per_patch(self) -> float:
        """Mean positions of a patch at which the rule aims."""
        return BYTES_PER_WORD if isinstance(self.patcher, ByteClassConfig) else float(self.patcher.size)


class MainConfig(LayoutConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The stack over the patches of the last stage. Its attention sees all earlier patches."""

    layers: Layout
    """Blocks, such as T22. m is Mamba-2, t is attention; M and T have a feed-forward layer too."""


class HNetConfig(PredictsFurther, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """H-Net (arXiv:2507.07955)."""

    family: Literal["hnet"] = "hnet"
    """Model family; each has its own fields."""
    sequence_length: int = Field(ge=1)
    """T: bytes of one training sequence and the longest context."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """Stages, the outermost first. Each reads the patches of the one before it."""
    main: MainConfig
    """The stack over the patches of the last stage."""
    mamba: MambaSizes = MambaSizes()
    """Sizes of Mamba-2 layers."""
    rotary: RotaryConfig = RotaryConfig()
    """Rotary angles of attention. AU-Net has a fraction of 1 and a base of 500,000."""
    rate_multipliers: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Factors of the learning rate, one for each stage and one for the main stack. Null: the paper's rule (section
    2.3)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention weights and of each layer's output that training drops. The paper has none."""
    initial_std: float | None = Field(default=0.02, gt=0)
    """Standard deviation of the initial linear maps and of the head. They are normal, cut at two deviations. Maps into
    a residual stream have it divided by the square root of the number of layers on it and on those around it. Null: the
    inverse square root of the inputs of each map and of the channels of an embedding, as in AU-Net."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        widths = [stage.width for stage in self.stages] + [self.main.width]
        for outer, inner in pairwise(widths):
            if inner < outer:
                raise ValueError(f"width {inner} is less than the width {outer} of the stage around it")
        layouts = [(stage, layout) for stage in self.stages for layout in (stage.encoder, stage.decoder)]
        for sizes, layout in (*layouts, (self.main, self.main.layers)):
            if fault := sizes.fault(layout, self.mamba):
                raise ValueError(fault)
        if any(isinstance(stage.patcher, ByteClassConfig) for stage in self.stages[1:]):
            raise ValueError("patcher byte_class reads bytes, and only the first stage does; use learned or fixed")
        if self.rate_multipliers is not None and len(self.rate_multipliers) != len(widths):
            raise ValueError(
                f"rate_multipliers has {len(self.rate_multipliers)} factors; one for each stage and one for the main "
                f"stack are {len(widths)}"
            )
        return self

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Factors of the learning rate: of each stage, and of the main stack.

        By the paper's rule (appendix C, equation 11), the rate of a stage grows with the square root of the positions
        that it reads and of the inverse of its width.
        """
        if self.rate_multipliers is not None:
            return self.rate_multipliers
        widths = [stage.width for stage in self.stages] + [self.main.width]
        outer = [1.0]
        for stage in self.stages:
            outer.append(outer[-1] * stage.positions_per_patch)
        return tuple(
            math.sqrt(BYTES_PER_TOKEN / bytes_each * self.main.width / width)
            for bytes_each, width in zip(outer, widths, strict=True)
        )


class Stage(nn.Module):
    """Encoder, patcher and decoder around an inner network, which `HNet` runs."""

    def __init__(
        self, config: StageConfig, inner_width: int, mamba: MambaSizes, rotary: RotaryConfig, dropout: float
    ) -> None:
        """Build the networks.

        Args:
            config: of the stage.
            inner_width: channels of the inner network.
            mamba: sizes of Mamba-2 layers.
            rotary: as of `LayoutStack`.
            dropout: as of `LayoutStack`.
        """
        super().__init__()
        self.width = config.width
        self.encoder = LayoutStack(config.encoder, config, mamba, rotary, config.window, dropout)
        self.patcher = (
            Router(config.patches, config.width, config.patcher)
            if isinstance(config.patcher, LearnedConfig)
            else build_patcher(config.patcher, config.patches)
        )
        self.downsampling = config.downsampling
        self.is_smoothed = isinstance(config.patcher, LearnedConfig) and config.patcher.smoothing
        self.is_straight_through = isinstance(config.patcher, LearnedConfig) and config.patcher.straight_through
        self.residual: ExactLinear | None = None
        self.pad: nn.Parameter | None = None
        self.down: nn.Linear | None = None
        self.up: MultiLinear | None = None
        if config.join == "multi_linear":
            self.down = nn.Linear(config.width, inner_width, bias=False)
            self.up = MultiLinear(inner_width, config.width, config.places)
        else:
            self.residual = ExactLinear(config.width, config.width)
            self.pad = nn.Parameter(torch.empty(inner_width - config.width)) if inner_width > config.width else None
        self.decoder = LayoutStack(config.decoder, config, mamba, rotary, config.window, dropout)

    def encode(self, x: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        """Map (rows, n, width) inputs to the states that the rule, patches and the decoder read.

        The norm after the encoder is of patches alone where the states themselves reach the decoder.
        """
        states: Tensor = self.encoder(x, caches) if self.down is None else self.encoder.run_blocks(x, caches)
        return states

    def patch_inputs(self, states: Tensor, starts: Tensor, places: Tensor) -> Tensor:
        """Return inputs of the inner network.

        Args:
            states: (rows, n, width) of positions.
            starts: (rows, n) where patches start.
            places: (rows, k) positions of the starts, in order.

        Returns:
            (rows, k, inner_width)
        """
        if self.downsampling == "select":
            x = gather(states, places)
        else:
            x = pool(states, starts.cumsum(1) - starts.long(), places.shape[1], self.downsampling)
        if self.down is not None:
            mapped: Tensor = self.down(self.encoder.norm(x))
            return mapped
        return x if self.pad is None else torch.cat([x, self.pad.expand(*x.shape[:2], -1)], -1)

    def smoothed(self, inner: Tensor, probabilities: Tensor | None, before: Tensor | None = None) -> Tensor:
        """Return the outputs of patches, smoothed over patches if the stage does so.

        Args:
            inner: (rows, k, inner_width) outputs of the inner network.
            probabilities: (rows, k) of the patches; None if the patcher has none.
            before: (rows, …) smoothed output of the patch before; None if there is none.

        Returns:
            (rows, k, width), or (rows, k, inner_width) for `up`, in fp32 or more precise.
        """
        values = inner[..., : self.width] if self.up is None else inner
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return smooth(values, probabilities, before) if self.is_smoothed and probabilities is not None else values

    def spread(self, outputs: Tensor, numbers: Tensor, ages: Tensor) -> Tensor:
        """Return what positions get of their newest patches, (rows, n, width).

        Args:
            outputs: of patches; see `smoothed`.
            numbers: (rows, n) newest patch at each position.
            ages: (rows, n) positions since the start of this patch.
        """
        if self.up is None:
            return gather(outputs, numbers)
        found: Tensor = self.up(outputs.to(self.up.shared.weight.dtype), numbers, ages)
        return found

    def join(self, states: Tensor, newest: Tensor, patches: Patches) -> Tensor:
        """Return what the decoder reads.

        Args:
            states: (rows, n, width) of the encoder.
            newest: (rows, n, width) what each position gets of its newest patch; see `spread`.
            patches: where patches start.

        Returns:
            (rows, n, width)
        """
        if patches.probabilities is not None:
            confidence = torch.where(patches.starts, patches.probabilities, 1 - patches.probabilities)
            if self.is_straight_through:
                confidence = 1 + confidence - confidence.detach()  # 1, with the gradient of the confidence
            newest = newest * confidence[..., None]
        return (newest + (states if self.residual is None else self.residual(states))).to(states.dtype)

    def flops(self, length: int, patches: int) -> int:
        """Return the operations of the stage's own matrix products over positions and patches of one row."""
        by_positions = linear_weights(self.patcher) + (0 if self.residual is None else self.width**2)
        by_patches = 0 if self.down is None or self.up is None else linear_weights(self.down) + linear_weights(self.up)
        own = 2 * length * by_positions + 2 * patches * by_patches
        return self.encoder.flops(length) + self.decoder.flops(length) + own


class HNet(ByteModel):
    """Nested stages around a main stack."""

    def __init__(self, config: HNetConfig) -> None:
        """Build the model, and draw its parameters from torch's default generator."""
        super().__init__()
        self.sequence_length, self.initial_std = config.sequence_length, config.initial_std
        self.multipliers = config.multipliers
        width = config.stages[0].width
        inner_widths = [stage.width for stage in config.stages[1:]] + [config.main.width]
        self.embedding = embedding(VOCABULARY, width)
        self.start = nn.Parameter(torch.empty(width))
        self.stages = nn.ModuleList(
            Stage(stage, inner, config.mamba, config.rotary, config.dropout)
            for stage, inner in zip(config.stages, inner_widths, strict=True)
        )
        self.main = LayoutStack(config.main.layers, config.main, config.mamba, config.rotary, None, config.dropout)
        self.head = nn.Parameter(torch.empty(VOCABULARY, width))
        added = [additions(stage.encoder) + additions(stage.decoder) for stage in config.stages]
        self.depths = [sum(added[: level + 1]) for level in range(len(added))]
        """Layers on the residual streams of each stage and of those around it; then those of the main stack too."""
        self.depths.append(sum(added) + additions(config.main.layers))
        self.initialize()

    def level(self, name: str) -> int:
        """Return the stage of a parameter; the main stack is the last. A pad is of the network that reads it."""
        first, *rest = name.split(".")
        if first == "main":
            return len(self.stages)
        return int(rest[0]) + (rest[1] == "pad") if first == "stages" else 0

    def rate_multiplier(self, name: str) -> float:
        """Return the factor of the learning rate of a parameter's stage."""
        return self.multipliers[self.level(name)]

    def model_initial(self, name: str) -> Initial:
        """Return first values as in the authors' code: see `HNetConfig.initial_std`, and zeros for the linear residual.

        Embeddings have a deviation of 1 beside a given one, because the first norm is within the first block.
        """
        if ".residual." in name or name.endswith((".pad", ".score.bias")):
            return Initial()
        if ".convolution." in name:
            return Initial(quantile=lambda numbers: (2 * numbers - 1) / math.sqrt(TAPS))
        if self.initial_std is None:
            module = self.get_submodule(name.rpartition(".")[0])
            return Initial((module.in_features if isinstance(module, nn.Linear) else self.head.shape[1]) ** -0.5)
        if name.endswith(("contract.weight", "output.weight")):
            return Initial(self.initial_std / math.sqrt(self.depths[self.level(name)]))
        return Initial(1.0 if name in ("start", "embedding.weight") else self.initial_std)

    def first_values(
        self,
        name: str,
        shape: tuple[int, ...],
        seed: int,
        *,
        begin: int = 0,
        end: int | None = None,
        version: int = FIRST_VALUES,
    ) -> Tensor:
        """Return a range of a parameter's first values; maps of routers begin as the identity."""
        if not name.endswith(("patcher.query.weight", "patcher.key.weight")):
            return super().first_values(name, shape, seed, begin=begin, end=end, version=version)
        places = torch.arange(begin, math.prod(shape) if end is None else end)
        return (places % (shape[1] + 1) == 0).float()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the negative log-likelihood of every id; see `ByteModel.forward`.

        The gradient has that of the ratio losses too: each row adds its own to all its positions.
        """
        self.check_length(ids.shape[1])
        before = ids[:, :-1].long()
        losses: list[Tensor] = []
        x = self.run(0, self.embed(before), F.pad(before, (1, 0), value=SEPARATOR), losses)
        nats = self.nats(x, ids.long())
        for loss in losses:
            nats = nats + (loss - loss.detach())[:, None].to(nats.dtype)
        return nats

    def embed(self, before: Tensor) -> Tensor:
        """Map the (rows, n) first ids of rows to what their first n + 1 positions read, (rows, n + 1, d)."""
        return torch.cat([self.start.expand(len(before), 1, -1), self.embedding(before)], 1)

    def run(self, level: int, x: Tensor, read: Tensor, losses: list[Tensor]) -> Tensor:
        """Map (rows, n, width) inputs of a network to its outputs.

        Args:
            level: number of the stage; that of the main stack comes after the stages.
            x: inputs.
            read: (rows, n) ids that positions read: of patches, those that their first positions read; PADDING where
                there is no patch.
            losses: list to which stages append their (rows,) ratio losses.
        """
        if level == len(self.stages):
            done: Tensor = self.main(x)
            return done
        stage = self.stages[level]
        assert isinstance(stage, Stage)
        states = stage.encode(x)
        patches = stage.patcher(read, None, states)
        places, used = chunk_places(patches.starts, stage.patcher.capacity)
        of_patches = read.gather(1, places).masked_fill(~used, PADDING)
        inner = self.run(level + 1, stage.patch_inputs(states, patches.starts, places), of_patches, losses)
        probabilities = None if patches.probabilities is None else patches.probabilities.gather(1, places)
        numbers = patches.starts.cumsum(1) - 1
        ages = torch.arange(x.shape[1], device=x.device) - places.gather(1, numbers)
        newest = stage.spread(stage.smoothed(inner, probabilities), numbers, ages)
        if isinstance(stage.patcher, Router) and torch.is_grad_enabled():
            losses.append(stage.patcher.loss(patches, read))
        decoded: Tensor = stage.decoder(stage.join(states, newest, patches))
        return decoded

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the head, which is not tied to the embeddings, without biases."""
        return self.head, None

    def stacks(self) -> dict[str, list[Unit]]:
        """Return the blocks in the order in which they run: encoders inwards, the main stack, decoders outwards."""
        stages = list(enumerate(self.stages))
        return {
            **{f"encoder.{number}": units_of(stage.get_submodule("encoder")) for number, stage in stages},
            "main": units_of(self.main),
            **{f"decoder.{number}": units_of(stage.get_submodule("decoder")) for number, stage in reversed(stages)},
        }

    def scored(self, length: int) -> slice:
        """Return all positions."""
        return slice(0, length)

    def decoder(self, rows: int) -> "HNetDecoder":
        """Return a new decoder of `rows` rows."""
        return HNetDecoder(self, rows)

    def patchers(self) -> dict[str, Patcher]:
        """Return the rule of each stage."""
        return {str(number): stage.patcher for number, stage in enumerate(self.stages) if isinstance(stage, Stage)}

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products; a row counts with all the patches that it may have."""
        slots = [length]
        for patcher in self.patchers().values():
            slots.append(min(patcher.capacity, slots[-1]))
        return round(self.useful_flops(length, slots[1:]))

    def useful_flops(self, length: int, patches: Sequence[float]) -> float:
        """Return the operations of a row with so many patches, rounded; see `ByteModel.useful_flops`."""
        lengths = [length, *map(round, patches)]
        sizes = zip(self.stages, pairwise(lengths), strict=True)
        own = [stage.flops(*positions) for stage, positions in sizes if isinstance(stage, Stage)]
        return 2 * length * self.head.numel() + sum(own) + self.main.flops(lengths[-1])


class HNetDecoder:
    """Decoder over the caches and states of all networks.

    Rows start patches at different times, so the inner networks of each row have caches of their own.
    """

    def __init__(self, model: HNet, rows: int) -> None:
        """Make a decoder of `rows` rows before the first byte."""
        self.length = 0
        self._model = model
        self._network = _Network(model, 0, rows)

    @torch.no_grad()
    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix; see `Decoder.prime`."""
        if self.length:
            raise ValueError("only a fresh decoder can be primed")
        self._model.check_room(ids.shape[1])
        read = F.pad(ids.long(), (1, 0), value=SEPARATOR)
        return self._feed(self._model.embed(ids.long()), read, ids.shape[1])

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row; see `Decoder.step`."""
        self._model.check_room(self.length + 1)
        read = ids.long()[:, None]
        return self._feed(self._model.embedding(read), read, 1)

    def _feed(self, x: Tensor, read: Tensor, count: int) -> Tensor:
        self.length += count
        return self._model.logits(self._network.feed(x, read)[:, -1])


class _Newest(NamedTuple):
    """Newest patch of a row."""

    output: Tensor
    """(1, …) smoothed output; see `Stage.smoothed`."""
    start: Tensor
    """(1, 1) position at which it starts."""


class _Network:
    """A stage or the main stack of rows that are decoded, with all within it."""

    def __init__(self, model: HNet, level: int, rows: int) -> None:
        self._stage: Stage | None = None
        if level == len(model.stages):
            self._main, self._caches = model.main, model.main.empty_caches()
            return
        stage = model.stages[level]
        assert isinstance(stage, Stage)
        self._stage = stage
        self._encoder, self._decoder = stage.encoder.empty_caches(), stage.decoder.empty_caches()
        self._state: PatchState | None = None
        self._inner = [_Network(model, level + 1, 1) for _ in range(rows)]
        self._newest: list[_Newest | None] = [None] * rows
        self._open: list[Tensor | None] = [None] * rows
        """For each row, (1, n, width) states after the start of its newest patch, if stages pool them."""

    def feed(self, x: Tensor, read: Tensor) -> Tensor:
        """Map the next positions, (rows, n, width), to their outputs; `read` is as of `HNet.run`."""
        if self._stage is None:
            done: Tensor = self._main(x, self._caches)
            return done
        stage = self._stage
        states = stage.encode(x, self._encoder)
        patches = stage.patcher(read, self._state, states)
        self._state = patches.state
        newest = torch.cat([self._served(row, states, read, patches) for row in range(len(x))])
        decoded: Tensor = stage.decoder(stage.join(states, newest, patches), self._decoder)
        return decoded

    def _served(self, row: int, states: Tensor, read: Tensor, patches: Patches) -> Tensor:
        """Return what the positions of a row get of its newest patches, (1, n, width)."""
        assert self._stage is not None
        starts, before = patches.starts[row : row + 1], self._newest[row]
        places, length = starts.nonzero()[None, :, 1], patches.state.length
        positions = torch.arange(length - starts.shape[1], length, device=starts.device)
        known = [] if before is None else [before.output[:, None]]
        inputs = self._patch_inputs(row, states[row : row + 1], starts, places)
        if places.numel():
            inner = self._inner[row].feed(inputs, read[row : row + 1].gather(1, places))
            of_row = None if patches.probabilities is None else patches.probabilities[row : row + 1].gather(1, places)
            known.append(self._stage.smoothed(inner, of_row, None if before is None else before.output))
        begun = positions[places] if before is None else torch.cat([before.start, positions[places]], 1)
        outputs, numbers = torch.cat(known, 1), starts.cumsum(1) - (1 if before is None else 0)
        self._newest[row] = _Newest(outputs[:, -1], begun[:, -1:])
        return self._stage.spread(outputs, numbers, positions - begun.gather(1, numbers))

    def _patch_inputs(self, row: int, states: Tensor, starts: Tensor, places: Tensor) -> Tensor:
        """Return what `Stage.patch_inputs` returns for a row, whose open patch may have begun in earlier calls."""
        stage, kept = self._stage, self._open[row]
        assert stage is not None and self._state is not None
        if stage.downsampling == "select":
            return stage.patch_inputs(states, starts, places)
        if kept is not None:
            states, starts, places = (
                torch.cat([kept, states], 1),
                F.pad(starts, (kept.shape[1], 0)),
                places + kept.shape[1],
            )
        is_full = int(self._state.patches[row]) >= stage.patcher.capacity  # no later patch reads these states
        ended = states.shape[1] if is_full else int(places[0, -1]) + 1 if places.numel() else 0
        self._open[row] = states[:, ended:]
        return stage.patch_inputs(states, starts, places)


def _of_size(size: ModelSize) -> dict[str, Any]:
    """Return the fields of an H-Net of one stage of half the width, with patches of six bytes."""
    wide, outer = (
        size._replace(width=max(128, size.width)).stack(),
        size.stack(2),
    )  # a stage is narrower
    stage = {
        "width": outer["width"],
        "heads": outer["heads"],
        "encoder": "m4",
        "decoder": "m4",
        "window": 1024,
        "patcher": {"name": "learned", "size": 6},
        "patches": -(-size.sequence_length // 4),
    }
    main = {"width": wide["width"], "heads": wide["heads"], "layers": f"T{size.layers}"}
    return {"stages": [stage], "main": main}


register_family(
    Family(
        name="hnet",
        reference=REFERENCES / "hnet.py",
        config=HNetConfig,
        build=HNet,
        free_fields=frozenset({"dropout", "initial_std", "rate_multipliers", "mamba.chunk"}),
        of_size=_of_size,
        small={
            "sequence_length": 32,
            "stages": [
                {
                    "width": 16,
                    "heads": 2,
                    "encoder": "m1t1",
                    "decoder": "m1",
                    "window": 8,
                    "patcher": {"name": "learned", "size": 3},
                    "patches": 20,
                }
            ],
            "main": {"width": 24, "heads": 2, "layers": "T1"},
            "mamba": {"head_width": 8, "state": 4, "chunk": 8},
            "dropout": 0.1,
        },
    )
)
