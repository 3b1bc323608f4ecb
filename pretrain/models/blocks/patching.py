"""Patches that follow the data: where they start, and vectors of patches instead of positions.

    positions   start  T    h    e    ·    c    a    t        what each position reads
    starts        1    0    0    0    1    0    0    0        boundary flags, functions of what was read so far
    patch         0    0    0    0    1    1    1    1        newest patch that a position may use

Position i reads the id before i and predicts id i, so a patch that starts at i helps to predict id i and later ids.

A row has at most `capacity` patches, a constant of the model. After them, it continues without new ones: every
byte is scored, shapes are static, and a prefix has the patches that it has in the whole row.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR


class ByteClassConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Patches start at the ends of words: SpaceByte's rule (arXiv:2404.14408, section 3)."""

    name: Literal["byte_class"] = "byte_class"
    """Rule of the patches."""


class FixedConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Patches of one size."""

    name: Literal["fixed"] = "fixed"
    """Rule of the patches."""
    size: int = Field(ge=1)
    """Positions of a patch."""


PatcherConfig = Annotated[ByteClassConfig | FixedConfig, Field(discriminator="name")]
"""Rule by which patches start."""


@dataclass
class PatchState:
    """What a patcher keeps of the positions of rows so far."""

    length: int
    """Positions so far."""
    patches: Tensor
    """(rows,) patches so far."""
    last: Tensor
    """(rows,) id that the last position read; SEPARATOR before position 0."""

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "PatchState":
        """Return the state before the first position."""
        patches = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(0, patches, torch.full_like(patches, SEPARATOR))


class Patcher(ABC):
    """Rule by which patches start."""

    def __init__(self, capacity: int) -> None:
        """Make the rule.

        Args:
            capacity: patches that a row may have.
        """
        self.capacity = capacity

    def __call__(self, read: Tensor, state: PatchState | None = None) -> tuple[Tensor, PatchState]:
        """Return where patches start, and the state after these positions.

        A position that reads SEPARATOR starts a patch; one that reads PADDING does not.

        Args:
            read: (rows, n) ids that positions read, n >= 1; position 0 of a row reads SEPARATOR.
            state: after the positions before; None: there are none.

        Returns:
            (rows, n) booleans, true where a patch starts.
        """
        state = PatchState.empty(len(read), read.device) if state is None else state
        starts = (self.rule(read, state) | (read == SEPARATOR)) & (read != PADDING)
        counts = state.patches[:, None] + starts.cumsum(1)
        starts &= counts <= self.capacity
        patches = counts[:, -1].clamp(max=self.capacity)
        return starts, PatchState(state.length + read.shape[1], patches, read[:, -1].long())

    @abstractmethod
    def rule(self, read: Tensor, state: PatchState) -> Tensor:
        """Return where patches start by the rule alone; see `__call__` for the arguments."""


class ByteClass(Patcher):
    """A patch starts at the first spacelike byte of a run: neither a digit, a letter nor a continuation of UTF-8."""

    def rule(self, read: Tensor, state: PatchState) -> Tensor:
        """Return where runs of spacelike bytes begin."""
        spacelike = is_spacelike(read)
        before = torch.cat([is_spacelike(state.last)[:, None], spacelike[:, :-1]], 1)
        return spacelike & ~before


class Fixed(Patcher):
    """A patch starts at every multiple of its size."""

    def __init__(self, capacity: int, size: int) -> None:
        """Make the rule of patches of `size` positions."""
        super().__init__(capacity)
        self.size = size

    def rule(self, read: Tensor, state: PatchState) -> Tensor:
        """Return the multiples of the size."""
        places = torch.arange(state.length, state.length + read.shape[1], device=read.device)
        return (places % self.size == 0).expand(read.shape)


def build_patcher(config: ByteClassConfig | FixedConfig, capacity: int) -> Patcher:
    """Return the rule of a config."""
    return ByteClass(capacity) if isinstance(config, ByteClassConfig) else Fixed(capacity, config.size)


def is_spacelike(ids: Tensor) -> Tensor:
    """Return which ids are spacelike: all but digits, letters and the bytes 0x80 to 0xBF. SEPARATOR is spacelike."""
    letter = ids | 0x20  # lower case
    word = ((ids >= 0x30) & (ids <= 0x39)) | ((letter >= 0x61) & (letter <= 0x7A))
    return ~(word | ((ids >= 0x80) & (ids <= 0xBF)))


def chunk_places(starts: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return the positions at which patches start, in order.

    Args:
        starts: (rows, n) booleans, at most `capacity` of them true in a row.
        capacity: patches that a row may have.

    Returns:
        (rows, min(capacity, n)) positions, and which of them are patches. The others come last; they are any positions.
    """
    slots = min(capacity, starts.shape[1])
    places = (~starts).int().argsort(dim=1, stable=True)[:, :slots]
    return places, torch.arange(slots, device=starts.device) < starts.sum(1, keepdim=True)


def gather(x: Tensor, places: Tensor) -> Tensor:
    """Return the vectors of (rows, n, width) at (rows, k) places: (rows, k, width)."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def add_at(x: Tensor, places: Tensor, used: Tensor, values: Tensor) -> Tensor:
    """Return (rows, n, width) vectors plus (rows, k, width) values at (rows, k) places, where they are used."""
    return x.scatter_add(1, places[..., None].expand_as(values), values * used[..., None])
