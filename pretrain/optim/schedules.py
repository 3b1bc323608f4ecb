"""Learning-rate schedules: the rate as a function of the step."""

import math
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from byteloom.core.validation import Mismatch

if TYPE_CHECKING:
    from pretrain.optim.config import OptimizerConfig


class ScheduleConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The learning rate over a run: a linear warm-up, then one of four shapes."""

    shape: Literal["polynomial", "cosine", "constant", "wsd"] = "polynomial"
    """Shape after the warm-up: polynomial decay, half a cosine, constant, or warm-up-stable-decay (constant, then
    linear decay over the last `decay_fraction` of the run)."""
    warmup_steps: int = Field(default=500, ge=0)
    """Steps in which the rate rises from 0 to `learning_rate`."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Rate at the end of the last step, as a share of `learning_rate`."""
    power: float = Field(default=1.0, gt=0)
    """Power of the polynomial; 1 is a straight line, as in the MEGABYTE paper."""
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of the run that decays, for wsd."""


def learning_rate_at(config: "OptimizerConfig", step: int, steps: int) -> float:
    """Return the learning rate of an update.

    Args:
        config: the peak rate and the schedule.
        step: number of the update; the first is 0.
        steps: updates of the whole run.
    """
    schedule = config.schedule
    if step < schedule.warmup_steps:
        return config.learning_rate * (step + 1) / schedule.warmup_steps
    progress = min((step - schedule.warmup_steps) / max(steps - schedule.warmup_steps, 1), 1.0)
    if schedule.shape == "constant":
        height = 1.0
    elif schedule.shape == "polynomial":
        height = (1 - progress) ** schedule.power
    elif schedule.shape == "cosine":
        height = (1 + math.cos(math.pi * progress)) / 2
    else:
        height = min((steps - step) / (schedule.decay_fraction * steps), 1.0)
    return config.learning_rate * (schedule.final_fraction + (1 - schedule.final_fraction) * height)


def schedule_mismatch(schedule: ScheduleConfig, steps: int) -> Mismatch | None:
    """Return why a schedule does not fit a run of `steps`; None if it fits.

    Warm-up must end before the run does, and before decay begins. Then `learning_rate_at` never falls faster than the
    decay alone does.
    """
    warmup = schedule.warmup_steps
    if warmup >= steps:
        return Mismatch(
            f"optimizer.schedule.warmup_steps ({warmup}) must be less than train.steps ({steps}); the learning rate "
            "would never reach its peak",
            ("optimizer.schedule.warmup_steps", "train.steps"),
        )
    if schedule.shape == "wsd" and warmup + schedule.decay_fraction * steps > steps + 1:
        most = math.floor(1000 * (steps - warmup) / steps) / 1000
        return Mismatch(
            f"optimizer.schedule.decay_fraction ({schedule.decay_fraction}) must be at most {most}; decay would begin "
            f"within the {warmup} warm-up steps of a run of {steps}",
            ("optimizer.schedule.decay_fraction", "optimizer.schedule.warmup_steps", "train.steps"),
        )
    return None
