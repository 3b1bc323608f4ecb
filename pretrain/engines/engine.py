"""Contract of the engines: an engine owns device, precision, sharding, accumulation and the optimizer step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byteloom.core.errors import CorrectableError
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.mixture import RowSources
from data_pipeline.stream.rows import Ids
from pretrain.distributed.fragments import Fragment
from pretrain.engines.phases import RankStep
from pretrain.models.initial import FIRST_VALUES


class EngineError(CorrectableError):
    """An engine does not run here, or not as configured."""


@dataclass(frozen=True)
class UpdateLimits:
    """Largest numbers of a global batch with which its update is done."""

    nats_per_byte: float = math.inf
    """Loss."""
    gradient_norm: float = math.inf
    """Global norm of the gradient before clipping."""


NO_LIMITS = UpdateLimits()
"""Limits that every finite gradient keeps."""


class Upcoming(NamedTuple):
    """This rank's part of the next step. The ranks exchange it with the numbers of the current step."""

    micro_batches: Sequence[MicroBatch]
    """Micro-batches of this rank. A next step that gets the same object on all ranks counts no target bytes again."""
    numbers: Sequence[float] = ()
    """Numbers for all ranks; equally many on each."""


class RowLoss(NamedTuple):
    """Loss of one row of a global batch."""

    row: int
    """Number of the row in the global batch."""
    nats: float
    """Negative log-likelihood of its target bytes."""
    target_bytes: int


@dataclass(frozen=True)
class StepResult:
    """Numbers of one optimizer step, over the whole global batch."""

    nats: float
    """Negative log-likelihood of all target bytes."""
    target_bytes: int
    """Number of bytes that count in the loss."""
    gradient_norm: float
    """Global norm of the gradient before clipping."""
    ranks: list[RankStep] = field(compare=False)
    """Times and memory of the step on each rank, by rank."""
    by_source: list[tuple[float, int]] = field(default_factory=list)
    """Nats and target bytes of the rows of each source; empty unless the sources were given."""
    is_updated: bool = True
    """True if the step changed the parameters. False if it was rejected, because a number exceeds its limit."""
    rows: list[RowLoss] = field(default_factory=list)
    """Loss of each row of the global batch, if the update was not done."""
    upcoming: list[list[float]] = field(default_factory=list, compare=False)
    """`Upcoming.numbers` of each rank, by rank; empty lists without."""
    diagnosis: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Norms by layer and gradient noise by the names of their numbers, if they were asked for."""
    patches: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Numbers of the patches by name, of a model whose patches follow the data; see `PatchCounts`."""


class NonFiniteError(Exception):
    """A gradient is infinite or not a number. The step has changed no parameter and no optimizer state.

    Args:
        fault: description.
        result: numbers of the step.
    """

    def __init__(self, fault: str, result: StepResult) -> None:
        super().__init__(fault)
        self.result = result


class Engine(Protocol):
    """One rank's engine. All ranks call the same methods in the same order."""

    device: torch.device
    dtype: torch.dtype
    """Type of parameters and activations in forward and backward passes."""

    def begin(self, version: int = FIRST_VALUES) -> None:
        """Give every parameter its first values: a function of seed and name, the same on any number of ranks.

        Args:
            version: of the generator of first values.
        """

    def rehearse(self, rows: int) -> None:
        """Run the passes of a made-up micro-batch of `rows` rows, without effect on training.

        It finds in seconds a fault that would otherwise appear at the first step.

        Raises:
            EngineError: there is too little memory.
        """

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        step: int,
        learning_rate: float,
        before_update: Callable[[], None] = lambda: None,
        sources: RowSources | None = None,
        limits: UpdateLimits = NO_LIMITS,
        look_ahead: Callable[[], Upcoming] | None = None,
        diagnose: bool = False,
    ) -> StepResult:
        """Do one optimizer step on this rank's micro-batches of the global batch.

        The gradient is that of the batch's nats divided by its target bytes, both counted over all ranks. The memory
        that the model carries from each row is the input of the same row in the next step.

        Args:
            micro_batches: of this rank, in order.
            step: number of the step; random numbers are seeded by it.
            learning_rate: of the update.
            before_update: called after the passes. Before it, no fragment changes.
            sources: sources of the rows, if losses by source are wanted; given on all ranks or on none.
            limits: largest numbers with which the update is done, the same on all ranks. The ranks agree before the
                update: either all of them do it or none.
            look_ahead: called once the update is queued, to exchange what a rank knows of the step after this one
                together with the numbers of this one; given on all ranks or on none.
            diagnose: whether to measure norms by layer and gradient noise; the same on all ranks. It changes no value.

        Raises:
            NonFiniteError: the gradient is not finite; on all ranks, before any parameter is changed.
        """

    def nats(self, ids: Ids, given: NDArray[np.number] | None = None) -> Tensor:
        """Return the (rows, n) fp32 nats of (rows, n) ids on the CPU, without gradient, dropout and memory.

        Args:
            ids: ids that are predicted.
            given: `Example.given`, if the model reads more than `ids`.
        """

    def forget(self) -> None:
        """Empty the memory that the model carries: the next rows do not continue the last ones."""

    def fragments(self) -> list[Fragment]:
        """Return what this rank holds: parts of masters and moments, and the memory of its rows of the global batch."""

    def owned_fragments(self) -> list[Fragment]:
        """Return the fragments that this rank owns. All ranks together own each element once."""

    def counters(self) -> dict[str, int]:
        """Return the engine's integers that a checkpoint stores with the fragments."""

    def restore(self, counters: dict[str, int]) -> None:
        """Set the counters, after a checkpoint has been read into the fragments."""
