"""Budget of each run of a comparison, and the number of steps that it pays for."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field

from pretrain.config.errors import ConfigError
from pretrain.config.schema import Config
from pretrain.estimate.activations import on_meta
from pretrain.estimate.training_flops import training_flops

UNITS = {"flops": "FLOPs", "bytes": "bytes", "seconds": "seconds"}


class Budget(BaseModel, frozen=True):
    """Budget of each run."""

    kind: Literal["flops", "bytes", "seconds"]
    """FLOPs of training, bytes read, or seconds of training without validations and checkpoints."""
    amount: float = Field(gt=0)

    def __str__(self) -> str:
        return f"--{self.kind} {self.amount:.6g}"

    def steps(self, name: str, cost: "StepCost") -> int:
        """Return the number of steps whose cost is nearest to the budget.

        Args:
            name: of the recipe, for errors.
            cost: of one step.

        Raises:
            ConfigError: one step costs more than the budget.
        """
        of_step = cost.of(self.kind)
        if of_step > self.amount:
            raise ConfigError(
                f"{name} cannot fit the budget {self}: one step takes {of_step:.4g} {UNITS[self.kind]}; give at least "
                f"--{self.kind} {_ceil(of_step):.4g}, or lower its train.global_batch"
            )
        return round(self.amount / of_step)


@dataclass(frozen=True)
class StepCost:
    """Cost of a training step of a recipe."""

    parameters: int
    flops: int
    """Forward and backward pass over the global batch, as of `ByteModel.flops`."""
    bytes: int
    """Places of bytes in the global batch."""
    seconds: float = math.nan
    """Measured in a trial; NaN where none was needed."""

    def of(self, kind: str) -> float:
        """Return the cost in the unit of a budget."""
        return float({"flops": self.flops, "bytes": self.bytes, "seconds": self.seconds}[kind])


def cost_of(config: Config) -> StepCost:
    """Return the cost of a step of a recipe, without its time."""
    model, rows = on_meta(config.model, config.finetune), config.train.global_batch
    flops = training_flops(model, config.model, config.finetune) * rows
    return StepCost(model.parameter_count(), flops, config.model.sequence_length * rows)


def _ceil(value: float) -> float:
    """Return a number rounded up to four digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / unit) * unit
