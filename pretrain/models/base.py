"""The contract of every model: bytes in, nats of every byte out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byteloom.core.seeds import seed_of
from pretrain.models.blocks.nats import linear_nats
from pretrain.models.blocks.unit import Unit


class Decoder(Protocol):
    """The incremental form of a model's forward pass, with caches. Agrees with it for every prefix."""

    @property
    def length(self) -> int:
        """Bytes fed so far."""

    def prime(self, ids: Tensor) -> Tensor:
        """Feeds a whole prefix to a fresh decoder in one parallel pass.

        Args:
            ids: (rows, n) with n >= 0.
        Returns:
            (rows, VOCABULARY) logits of the id after the prefix.
        """

    def step(self, ids: Tensor) -> Tensor:
        """Feeds one id a row: (rows,) -> (rows, VOCABULARY) logits of the next.

        Raises:
            ValueError: the context is full.
        """


@dataclass(frozen=True)
class Initial:
    """A normal distribution cut at two deviations; with a deviation of 0, one number."""

    std: float = 0.0
    mean: float = 0.0


Memory = dict[str, Tensor]
"""What a model carries from a sequence to the next one of its lane: tensors by name, with a row for each lane. Without
gradient, and exact in fp32, in which engines and checkpoints keep it."""


class ByteModel(nn.Module, ABC):
    """An autoregressive model of bytes: single-device mathematics that knows no process group."""

    sequence_length: int
    """The longest context, in bytes, that the model can read."""
    decodes_without_end: ClassVar[bool] = False
    """Whether a decoder goes on past sequence_length bytes, with a memory of what it read."""

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """The price of every id, given those before it in its row.

        A model that carries memory takes one as a second argument by option, and returns the next one beside the nats.

        Args:
            ids: (rows, T) integers below VOCABULARY, 1 <= T <= sequence_length.
        Returns:
            (rows, T) fp32 nats; row t depends on ids before t (and on id t as the target), on nothing after it. Those
            of positions that are not scored mean nothing.
        """

    def empty_memory(self, rows: int) -> Memory:
        """The memory of lanes that begin, on the parameters' device; nothing if the model carries none."""
        return {}

    @abstractmethod
    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """The linear map from the last hidden states to logits: (VOCABULARY, width), and (VOCABULARY,) or None."""

    def logits(self, states: Tensor) -> Tensor:
        """(..., width) last hidden states to (..., VOCABULARY) logits."""
        return F.linear(states, *self.head_weights())

    def nats(self, states: Tensor, ids: Tensor) -> Tensor:
        """The price of (rows, n) ids under the logits of (rows, n, width) states, which never exist all at once."""
        return linear_nats(states.flatten(0, 1), ids.flatten(), *self.head_weights()).view(ids.shape).float()

    def units(self) -> list[Unit]:
        """Its blocks: what is compiled, and what is computed again in backward, one at a time."""
        return [unit for stack in self.stacks().values() for unit in stack]

    def stacks(self) -> dict[str, list[Unit]]:
        """Its blocks by the name of their pile, each from its first to its last; most models have one."""
        return {"blocks": units_of(self)}

    def outside_units(self) -> dict[str, nn.Parameter]:
        """The parameters of no block, by name."""
        within = {id(parameter) for unit in self.units() for parameter in unit.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) not in within}

    @abstractmethod
    def scored(self, length: int) -> slice:
        """The positions of a row of `length` ids, without padding at its end, that are scored outside training."""

    def draw_scored(self, rows: int, length: int) -> Tensor:
        """The positions that the next training pass over such rows scores: (rows, length) booleans on the CPU.

        A model that scores a random part draws it from torch's default generator, and a training pass draws the same
        before anything else if the generator is seeded alike. So targets can be counted before the pass.
        """
        scored = torch.zeros(rows, length, dtype=torch.bool)
        scored[:, self.scored(length)] = True
        return scored

    @abstractmethod
    def decoder(self, rows: int) -> Decoder:
        """A fresh decoder of `rows` rows."""

    @abstractmethod
    def flops(self, length: int) -> int:
        """Floating-point operations of the forward pass's matrix products over one row of `length` ids, and its memory.

        A product of (a, b) by (b, c) counts 2abc, and attention counts in full, as torch's FlopCounterMode does.
        """

    @abstractmethod
    def initial(self, name: str) -> Initial:
        """What a parameter's first values are drawn from."""

    def first_values(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """A parameter's values before training: fp32, on the CPU.

        They depend on the seed and the name alone, so any rank can draw the part that it holds of any model.
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
        """Gives every parameter its first values, by a seed from torch's default generator."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(self.first_values(name, tuple(parameter.shape), seed))

    def check_length(self, length: int) -> None:
        """Raises ValueError if a row of `length` bytes is more than the model can read."""
        if length > self.sequence_length:
            raise ValueError(
                f"a row of {length} bytes is longer than the model's sequence length, {self.sequence_length}"
            )

    def check_room(self, length: int) -> None:
        """Raises ValueError if a context of `length` bytes leaves none to predict."""
        if length >= self.sequence_length:
            raise ValueError(
                f"the context is full: it holds {length} of {self.sequence_length} bytes, so no byte is left to predict"
            )

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def units_of(module: nn.Module) -> list[Unit]:
    """The blocks within a module, in order."""
    return [inner for inner in module.modules() if isinstance(inner, Unit)]
