"""The contract of every engine: it owns device, precision, sharding, accumulation and the optimizer step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Ids
from pretrain.distributed.fragments import Fragment
from pretrain.engines.phases import RankStep


class EngineError(Exception):
    """An engine cannot be had as asked."""


class NonFiniteError(Exception):
    """A gradient is infinite or not a number. Parameters and optimizer are as they were before the step."""


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, over the whole global batch."""

    nats: float
    target_bytes: int
    gradient_norm: float
    """Before clipping."""
    ranks: list[RankStep] = field(compare=False)
    """What the step went to on each rank, by rank."""


class Engine(Protocol):
    """What each rank calls, all of them alike and in the same order."""

    device: torch.device
    dtype: torch.dtype
    """Of parameters and activations in forward and backward passes."""

    def begin(self) -> None:
        """Gives every parameter its first values: a function of seed and name, on any number of ranks."""

    def rehearse(self, rows: int) -> None:
        """Forward and backward of one micro-batch of `rows` made-up rows; changes nothing that training depends on.

        Finds in seconds what would otherwise fail at the first step.

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
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches of the global batch.

        The gradient is that of the batch's nats divided by its target bytes, both counted over all ranks. What the
        model carries from each row goes to the same row of the next step.

        Args:
            before_update: called after the passes. Before it, no fragment changes.
        Raises:
            NonFiniteError: before any parameter is changed; on all ranks.
        """

    def nats(self, ids: Ids) -> Tensor:
        """Without gradient, dropout and memory: (rows, T) ids to (rows, T) fp32 nats on the CPU."""

    def forget(self) -> None:
        """Empties what the model carries: the next step's rows do not go on where the last step's ended."""

    def fragments(self) -> list[Fragment]:
        """What this rank holds of every master and moment, and of the memory of its rows of the global batch."""

    def owned_fragments(self) -> list[Fragment]:
        """Of these, this rank's part: what all ranks own is everything, each element once."""

    def counters(self) -> dict[str, int]:
        """The engine's few integers that a checkpoint keeps beside the fragments."""

    def restore(self, counters: dict[str, int]) -> None:
        """Takes up counters, after a checkpoint has been read into the fragments."""
