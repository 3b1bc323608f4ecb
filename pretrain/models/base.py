"""Contract of every model: bytes in, negative log-likelihood of every byte out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.distributed.context import WHOLE_ROWS, Context
from pretrain.models.blocks.multi_byte import MultiByteConfig, MultiByteHeads
from pretrain.models.blocks.nats import linear_nats
from pretrain.models.blocks.unit import Unit
from pretrain.models.initial import (
    FIRST_VALUES,
    WHOLE_DRAWING,
    DeclaresInitial,
    Initial,
    ParameterScale,
    draw,
    draw_whole,
)
from pretrain.models.patching.patcher import Patcher


class Decoder(Protocol):
    """Incremental form of a model's forward pass, with caches. It agrees with the forward pass for every prefix."""

    @property
    def length(self) -> int:
        """Bytes fed so far."""

    def prime(self, ids: Tensor) -> Tensor:
        """Feed a whole prefix to a new decoder in one parallel pass.

        Args:
            ids: (rows, n) with n >= 0.

        Returns:
            (rows, VOCABULARY) logits of the id after the prefix.
        """

    def step(self, ids: Tensor) -> Tensor:
        """Feed one id a row, and return the logits of the next.

        Args:
            ids: (rows,)

        Returns:
            (rows, VOCABULARY)

        Raises:
            ValueError: the context is full.
        """


class RewindingDecoder(Decoder, Protocol):
    """Decoder that reads several ids of a row at once, and takes back the last ones, as speculation needs."""

    @property
    def states(self) -> Tensor:
        """Last hidden states after each id of the last call: (rows, n, width). The last one is that of the next id."""

    @property
    def most_fed(self) -> int:
        """Largest number of ids that `feed` takes now, at least 1. Room in the context is not considered."""

    def feed(self, ids: Tensor) -> Tensor:
        """Feed ids to a primed decoder in one parallel pass, and return the logits of the id after each.

        Args:
            ids: (rows, n) with 1 <= n <= `most_fed`.

        Returns:
            (rows, n, VOCABULARY)

        Raises:
            ValueError: the context is full.
        """

    def rewind(self, count: int) -> None:
        """Take back the last `count` ids of the last call of `feed`, which read more than `count`."""


class EncodingDecoder(Decoder, Protocol):
    """Decoder of a model with an encoder. It reads the sources of its rows before anything else."""

    def encode(self, source: Tensor) -> None:
        """Read the sources, once.

        Args:
            source: (rows, m) ids, padded at the end.
        """

    def select(self, rows: Tensor) -> None:
        """Replace the rows by some of them, which may repeat, as a beam search does.

        Args:
            rows: (n,) numbers of rows.
        """


TRAINING_PASSES = 3
"""Cost of training in forward passes: the backward pass has two products (gradients of inputs and weights) for one."""
FURTHER_HEADS = "multi_byte."
"""Beginning of the names of the parameters of multi-byte prediction. No other parameter depends on them."""

Memory = dict[str, Tensor]
"""Memory that a model carries from a sequence to the next one of its lane: tensors by name, one row a lane.

They have no gradient. Engines and checkpoints keep them in fp32, which holds them exactly."""


@runtime_checkable
class FusesMatrices(Protocol):
    """Module with parameters that hold several logical matrices, one below the other, such as queries and keys."""

    def own_fused_matrices(self) -> dict[str, int]:
        """Return how many matrices of equally many rows each such parameter holds, by its name within the module."""


class ByteModel(nn.Module, ABC):
    """Autoregressive model of bytes. Its mathematics is that of one device.

    A family that supports context parallelism computes the positions of its rank, and lets `context` exchange what
    depends on others.
    """

    context: Context = WHOLE_ROWS
    """Part of the rows that this process computes."""

    sequence_length: int
    """Longest context, in bytes, that the model can read."""
    patch_size: int | None = None
    """Bytes of a patch, if the model reads patches of one size."""
    attends_across_documents: bool = True
    """Whether the score of a byte may depend on earlier documents of its row. Separators end documents."""
    evaluation_modes: ClassVar[frozenset[str]] = frozenset({"windows", "sliding"})
    """Modes of evaluation that the model supports; `strided` and `sliding-strided` need a patch size, `memory` needs a
    memory."""
    z_loss: float = 0.0
    """Factor of the z-loss in the gradient of `nats`; see `linear_nats`."""
    reads_prompts_whole: bool = False
    """Whether the ids that prime a decoder are a prefix, which all see each other. A model that reads prefixes has it
    set when it is used."""
    scales: Mapping[str, ParameterScale] = MappingProxyType({})
    """Scales of parameters by name, under `optimizer.scaling` mup. Others have the first values that `initial` says."""
    decodes_without_end: ClassVar[bool] = False
    """Whether a decoder continues past sequence_length bytes, with a memory of earlier ones."""
    rewinds: bool = False
    """True: the decoder can take ids back; see `RewindingDecoder`."""

    def __init__(self) -> None:
        """Make a model without parameters."""
        super().__init__()
        self.multi_byte: MultiByteHeads | None = None

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """Return the negative log-likelihood of every id, given the ids before it in its row.

        A model that carries memory takes it as an optional second argument, and then returns a pair: the result and the
        next memory. An empty mapping is the memory of rows that begin.

        Args:
            ids: (rows, T) integers below VOCABULARY, 1 <= T <= sequence_length.

        Returns:
            (rows, T) fp32 nats. Value t depends on the ids before t, and on id t as the target; it depends on no later
            id. Values at unscored positions are undefined. If rows are cut over ranks, the values of other ranks'
            positions are 0.
        """

    def empty_memory(self, rows: int) -> Memory:
        """Return the memory of lanes that begin, on the parameters' device; {} if the model carries none."""
        return {}

    def empty_example(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return made-up arguments of a forward pass of full length: ids, and the second argument if there is one."""
        return torch.zeros(rows, self.sequence_length, dtype=torch.long, device=device), None

    @abstractmethod
    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Return the linear map from the last hidden states to logits.

        Returns:
            The weight, (VOCABULARY, width), and the bias, (VOCABULARY,) or None.
        """

    def logits(self, states: Tensor) -> Tensor:
        """Map (..., width) last hidden states to (..., VOCABULARY) logits."""
        return F.linear(states, *self.head_weights())

    def nats(self, states: Tensor, ids: Tensor) -> Tensor:
        """Return the negative log-likelihood of ids, without the logits of all positions at once.

        In training, further heads add their loss to the gradient. The result does not depend on them.

        Args:
            states: (rows, n, width) last hidden states of consecutive positions.
            ids: (rows, n)

        Returns:
            (rows, n) fp32 nats.
        """
        nats = linear_nats(states.flatten(0, 1), ids.flatten(), *self.head_weights(), self.z_loss)
        nats = nats.view(ids.shape).float()
        if self.multi_byte is None or not self.training:
            return nats
        further = self.multi_byte.nats(states, ids)
        return nats + self.multi_byte.weight * (further - further.detach())

    def predict_further(self, config: MultiByteConfig) -> None:
        """Add the heads of multi-byte prediction, and draw their parameters from torch's default generator."""
        self.multi_byte = MultiByteHeads(config, self.head_weights()[0].shape[1])
        self.initialize(FURTHER_HEADS)

    def patchers(self) -> dict[str, Patcher]:
        """Return the rules by which patches start, by stage, outermost first; {} if patches do not follow the data.

        Stages are numbered from "0", whose positions are those of the row. The positions of a further stage are the
        patches of the one before. A forward pass calls each rule once, as a module, with all positions of its stage.
        """
        return {}

    def set_context(self, context: Context) -> None:
        """Set the part of the rows that this process computes. Families that declare `row_parts` override this.

        Raises:
            ValueError: the rows of this model cannot be cut.
        """
        if context.size > 1:
            raise ValueError(f"the rows of a {type(self).__name__} cannot be cut over ranks")

    def units(self) -> list[Unit]:
        """Return the model's blocks, which are compiled and recomputed one at a time."""
        return [unit for stack in self.stacks().values() for unit in stack]

    def stacks(self) -> dict[str, list[Unit]]:
        """Return the blocks of each stack by its name, first block first. Most models have one stack."""
        return {"blocks": units_of(self)}

    def outside_units(self) -> dict[str, nn.Parameter]:
        """Return the parameters outside all blocks, by name."""
        within = {id(parameter) for unit in self.units() for parameter in unit.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) not in within}

    def fused_matrices(self) -> dict[str, int]:
        """Return the parameters that hold several logical matrices, and how many, as their modules declare it."""
        return {
            f"{path}.{parameter}": number
            for path, module in self.named_modules()
            if isinstance(module, FusesMatrices)
            for parameter, number in module.own_fused_matrices().items()
        }

    def head_norm(self) -> nn.Module | None:
        """Return the norm whose output the head reads, and nothing else; None if there is none.

        A model whose head is its table of embeddings has it scaled under `optimizer.scaling` mup.
        """
        return None

    def table_factors(self) -> dict[str, float]:
        """Return the factors by which the forward pass multiplies rows of tables, by the names of the tables."""
        return {}

    def rate_multiplier(self, name: str) -> float:
        """Return the factor of a parameter's learning rate, above 0.

        Families whose parts learn at different rates override this.

        Args:
            name: of the parameter.
        """
        return 1.0

    def may_decay(self, name: str) -> bool:
        """Return whether a matrix or table may decay; norms and biases never do.

        Families with exceptions override this.

        Args:
            name: of the parameter.
        """
        return True

    @abstractmethod
    def scored(self, length: int) -> slice:
        """Return the positions of a row that are scored outside training.

        Args:
            length: ids of the row, without padding at its end.
        """

    def draw_scored(self, rows: int, length: int) -> Tensor:
        """Return the positions that the next training pass scores, so that targets can be counted before the pass.

        A model that scores a random part draws it from torch's default generator. A training pass makes the same draw
        before any other, if the generator has the same seed.

        Returns:
            (rows, length) booleans on the CPU.
        """
        scored = torch.zeros(rows, length, dtype=torch.bool)
        scored[:, self.scored(length)] = True
        return scored

    @abstractmethod
    def decoder(self, rows: int) -> Decoder:
        """Return a new decoder of `rows` rows."""

    @abstractmethod
    def flops(self, length: int) -> int:
        """Return the floating-point operations of all matrix products of a forward pass over one row.

        Further heads, which run in training alone, do not count; see `training_flops`.

        A product of (a, b) by (b, c) counts 2abc. Attention counts in full, as in torch's FlopCounterMode. Products
        with a memory count too. A model in training counts a training pass, which may drop inputs.

        Args:
            length: ids of the row.
        """

    def useful_flops(self, length: int, patches: Sequence[float]) -> float:
        """Return `flops` of a row with so many patches, without the places that its capacity leaves empty.

        Models whose patches follow the data override this.

        Args:
            length: ids of the row.
            patches: mean number of patches of the row in each stage.
        """
        if self.patchers():
            raise NotImplementedError(f"{type(self).__name__} does not count the FLOPs of its patches")
        return self.flops(length)

    def training_flops(self, length: int) -> int:
        """Return the operations of the forward pass of a training step: `flops`, and those of further heads."""
        positions = len(range(length)[self.scored(length)])
        return self.flops(length) + (0 if self.multi_byte is None else self.multi_byte.flops(positions))

    def step_flops(self, length: int) -> int:
        """Return the operations of a training step on one row: TRAINING_PASSES times `training_flops`.

        A model that only decides where patches start has no backward pass, so its operations count once.
        """
        forward_only = sum(patcher.flops(length) for patcher in self.patchers().values())
        return TRAINING_PASSES * (self.training_flops(length) - forward_only) + forward_only

    def initial(self, name: str) -> Initial:
        """Return the distribution of a parameter's first values, as its module or else the model declares it."""
        path, _, parameter = name.rpartition(".")
        module = self.get_submodule(path)
        return module.own_initial(parameter) if isinstance(module, DeclaresInitial) else self.model_initial(name)

    @abstractmethod
    def model_initial(self, name: str) -> Initial:
        """Return the distribution of the first values of a parameter whose module does not declare one."""

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
        """Return a range of a flattened parameter before training: fp32, on the CPU.

        The values depend only on the seed, the name and the version, so each rank can draw its part of any model.

        Args:
            name: of the parameter.
            shape: of the whole parameter.
            seed: of the run.
            begin: of the range.
            end: of the range, exclusive; None is the end of the parameter.
            version: of the generator: FIRST_VALUES, or that of an earlier run.
        """
        initial = self.scales[name].initial if name in self.scales else self.initial(name)
        end = math.prod(shape) if end is None else end
        if version == WHOLE_DRAWING:
            return draw_whole(initial, seed, name, shape).view(-1)[begin:end]
        return draw(initial, seed, name, begin, end)

    @torch.no_grad()
    def initialize(self, beginning: str = "") -> None:
        """Set parameters to their first values, with a seed from torch's default generator.

        Args:
            beginning: of the names of the parameters that are set.
        """
        seed = int(torch.randint(2**62, (), device="cpu"))
        for name, parameter in self.named_parameters():
            if name.startswith(beginning) and not parameter.is_meta:
                parameter.copy_(self.first_values(name, tuple(parameter.shape), seed).view_as(parameter))

    def check_length(self, length: int) -> None:
        """Raise ValueError if a row of `length` bytes is longer than the model can read."""
        if length > self.sequence_length:
            raise ValueError(
                f"a row of {length} bytes is longer than the model's sequence length, {self.sequence_length}"
            )

    def check_room(self, length: int) -> None:
        """Raise ValueError if a context of `length` bytes leaves no byte to predict."""
        if length >= self.sequence_length:
            raise ValueError(
                f"the context is full: it holds {length} of {self.sequence_length} bytes, so no byte is left to predict"
            )

    def parameter_count(self) -> int:
        """Return the number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are not frozen, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def units_of(module: nn.Module) -> list[Unit]:
    """Return the blocks within a module, in order."""
    return [inner for inner in module.modules() if isinstance(inner, Unit)]
