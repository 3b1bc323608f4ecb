"""Contract of the rules by which patches start."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.vocabulary import PADDING, SEPARATOR


class PatchState(NamedTuple):
    """What a patcher keeps of the positions of rows so far."""

    length: int
    """Positions so far."""
    patches: Tensor
    """(rows,) patches so far."""
    last: Tensor
    """(rows,) id that the last position read; SEPARATOR before position 0."""
    memory: dict[str, Tensor] = {}  # noqa: RUF012 (never changed)
    """(rows, ...) tensors that the rule itself keeps, by name; empty before position 0."""
    decoder: Any = None
    """Decoder of a model that the rule runs. It reads later positions itself, so a state with one is used once."""

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "PatchState":
        """Return the state before the first position."""
        patches = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(0, patches, torch.full_like(patches, SEPARATOR))


class Decision(NamedTuple):
    """What a rule decides of positions, before separators, padding and the capacity are considered."""

    starts: Tensor
    """(rows, n) booleans, true where a patch should start."""
    probabilities: Tensor | None = None
    """(rows, n) probabilities of a start, of a rule that learns them."""
    memory: dict[str, Tensor] = {}  # noqa: RUF012 (never changed)
    """What the rule keeps for the positions after these; see `PatchState.memory`."""
    decoder: Any = None
    """Decoder that has read these positions; see `PatchState.decoder`."""


class Patches(NamedTuple):
    """Where patches start among positions of rows. ZeRO-3 finds the tensors of a module's result in tuples."""

    starts: Tensor
    """(rows, n) booleans, true where a patch starts: at most `capacity` in a whole row."""
    wanted: Tensor
    """(rows, n) booleans, true where a patch would start without a capacity."""
    probabilities: Tensor | None
    """(rows, n) probabilities of a start, of a rule that learns them."""
    state: PatchState
    """State after these positions."""


class Patcher(nn.Module, ABC):
    """Rule by which patches start."""

    target_ratio: float | None = None
    """Positions of a patch that a ratio loss aims at; None without such a loss."""

    def __init__(self, capacity: int) -> None:
        """Make the rule.

        Args:
            capacity: patches that a row may have.
        """
        super().__init__()
        self.capacity = capacity

    def forward(self, read: Tensor, state: PatchState | None = None, hidden: Tensor | None = None) -> Patches:
        """Return where patches start, and the state after these positions.

        A position that reads SEPARATOR starts a patch; one that reads PADDING does not.

        Args:
            read: (rows, n) ids that positions read, n >= 1; position 0 of a row reads SEPARATOR.
            state: after the positions before; None: there are none.
            hidden: what a rule reads besides: (rows, n, width) states of the positions, or (rows, n) entropies.
        """
        state = PatchState.empty(len(read), read.device) if state is None else state
        decision = self.rule(read, state, hidden)
        wanted = (decision.starts | (read == SEPARATOR)) & (read != PADDING)
        counts = state.patches[:, None] + wanted.cumsum(1)
        patches = counts[:, -1].clamp(max=self.capacity)
        last = read[:, -1].long()
        after = PatchState(state.length + read.shape[1], patches, last, decision.memory, decision.decoder)
        return Patches(wanted & (counts <= self.capacity), wanted, decision.probabilities, after)

    def flops(self, length: int) -> int:
        """Return the operations of all matrix products over one row of models that the rule runs and nothing trains."""
        return 0

    def frozen_bytes(self) -> int:
        """Return the bytes of weights that each device holds for the rule, apart from its parameters."""
        return 0

    def prepare(self, device: torch.device) -> None:
        """Read what the rule needs besides parameters, so that a forward pass on the device reads no file."""

    @abstractmethod
    def rule(self, read: Tensor, state: PatchState, hidden: Tensor | None) -> Decision:
        """Return what the rule alone decides; see `forward` for the arguments."""
