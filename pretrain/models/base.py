"""Contract of every model: bytes in, negative log-likelihood of every byte out."""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byteloom.core.seeds import seed_of
from pretrain.models.blocks.nats import linear_nats
from pretrain.models.blocks.unit import Unit
from pretrain.models.initial import DeclaresInitial, Initial


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


Memory = dict[str, Tensor]
"""Memory that a model carries from a sequence to the next one of its lane: tensors by name, one row a lane.

They have no gradient. Engines and checkpoints keep them in fp32, which holds them exactly."""


class ByteModel(nn.Module, ABC):
    """Autoregressive model of bytes. Its mathematics is that of one device; it knows no process group."""

    sequence_length: int
    """Longest context, in bytes, that the model can read."""
    patch_size: int | None = None
    """Bytes of a patch, if the model reads patches of one size."""
    evaluation_modes: ClassVar[frozenset[str]] = frozenset({"windows", "sliding"})
    """Modes of evaluation that the model supports; `strided` and `sliding-strided` need a patch size, `memory` needs a
    memory."""
    decodes_without_end: ClassVar[bool] = False
    """Whether a decoder continues past sequence_length bytes, with a memory of earlier ones."""

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """Return the negative log-likelihood of every id, given the ids before it in its row.

        A model that carries memory takes it as an optional second argument, and then returns a pair: the result and the
        next memory. An empty mapping is the memory of rows that begin.

        Args:
            ids: (rows, T) integers below VOCABULARY, 1 <= T <= sequence_length.

        Returns:
            (rows, T) fp32 nats. Value t depends on the ids before t, and on id t as the target; it depends on no later
            id. Values at unscored positions are undefined.
        """

    def empty_memory(self, rows: int) -> Memory:
        """Return the memory of lanes that begin, on the parameters' device; {} if the model carries none."""
        return {}

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

        Args:
            states: (rows, n, width) last hidden states.
            ids: (rows, n)

        Returns:
            (rows, n) fp32 nats.
        """
        return linear_nats(states.flatten(0, 1), ids.flatten(), *self.head_weights()).view(ids.shape).float()

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

        A product of (a, b) by (b, c) counts 2abc. Attention counts in full, as in torch's FlopCounterMode. Products
        with a memory count too.

        Args:
            length: ids of the row.
        """

    def initial(self, name: str) -> Initial:
        """Return the distribution of a parameter's first values, as its module or else the model declares it."""
        path, _, parameter = name.rpartition(".")
        module = self.get_submodule(path)
        return module.own_initial(parameter) if isinstance(module, DeclaresInitial) else self.model_initial(name)

    @abstractmethod
    def model_initial(self, name: str) -> Initial:
        """Return the distribution of the first values of a parameter whose module does not declare one."""

    def first_values(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Return a parameter's values before training: fp32, on the CPU.

        They depend only on the seed and the name, so each rank can draw its part of any model.
        """
        initial = self.initial(name)
        if not initial.std:
            return torch.full(shape, initial.mean)
        generator = torch.Generator().manual_seed(seed_of("parameter", seed, name))
        values = torch.empty(shape)
        low, high = initial.mean - 2 * initial.std, initial.mean + 2 * initial.std
        return nn.init.trunc_normal_(values, initial.mean, initial.std, low, high, generator=generator)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set every parameter to its first values, with a seed from torch's default generator."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(self.first_values(name, tuple(parameter.shape), seed))

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


def units_of(module: nn.Module) -> list[Unit]:
    """Return the blocks within a module, in order."""
    return [inner for inner in module.modules() if isinstance(inner, Unit)]
