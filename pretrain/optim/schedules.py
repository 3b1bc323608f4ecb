"""Learning-rate schedules: the rate as a function of the step."""

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from byteloom.core.validation import Mismatch, describe_value

if TYPE_CHECKING:
    from pretrain.optim.config import OptimizerConfig


class ScheduleConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """The learning rate over a run: a linear warm-up, then one of five shapes."""

    shape: Literal["polynomial", "cosine", "quarter_cosine", "constant", "wsd"] = "polynomial"
    """Shape after the warm-up. polynomial: polynomial decay. cosine: half a cosine. quarter_cosine: cos(pi x / 2), as
    SpaceByte's. constant: no decay. wsd (warm-up, stable, decay): constant, then linear decay over the last
    `decay_steps`, or the last `decay_fraction` of the run."""
    warmup_steps: int = Field(default=500, ge=0)
    """Steps in which the rate rises from 0 to `learning_rate`."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Rate at the end of the last step, as a share of `learning_rate`."""
    power: float = Field(default=1.0, gt=0)
    """Power of the polynomial; 1 is a straight line, as in the MEGABYTE paper."""
    decay_fraction: float | None = Field(default=0.2, gt=0, le=1)
    """Share of the run that decays, for wsd. Null if `decay_steps` is set."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Number of last steps that decay, for wsd, instead of `decay_fraction`."""

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_the_default_fraction(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("decay_steps") is not None:
            return {"decay_fraction": None, **values}
        return values

    def decay_length(self, steps: int) -> float:
        """Return how many of the last steps of a run decay, for wsd. It may be a fraction of a step."""
        if self.decay_steps is not None:
            return self.decay_steps
        assert self.decay_fraction is not None  # `schedule_mismatch` requires one of the two
        return self.decay_fraction * steps


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
    elif schedule.shape == "quarter_cosine":
        height = math.cos(math.pi / 2 * progress)
    else:
        height = min((steps - step) / schedule.decay_length(steps), 1.0)
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
    if (schedule.decay_steps is None) == (schedule.decay_fraction is None):
        return Mismatch(
            f"optimizer.schedule.decay_steps ({describe_value(schedule.decay_steps)}) and decay_fraction "
            f"({describe_value(schedule.decay_fraction)}) say how long the decay is; set one of them, and the other to "
            "null",
            ("optimizer.schedule.decay_steps", "optimizer.schedule.decay_fraction"),
        )
    if schedule.shape == "wsd" and warmup + schedule.decay_length(steps) > steps + 1:
        name, value = "decay_fraction", schedule.decay_fraction
        most: float = math.floor(1000 * (steps - warmup) / steps) / 1000
        if schedule.decay_steps is not None:
            name, value, most = "decay_steps", schedule.decay_steps, steps - warmup
        return Mismatch(
            f"optimizer.schedule.{name} ({value}) must be at most {most}; decay would begin within the {warmup} "
            f"warm-up steps of a run of {steps}",
            (f"optimizer.schedule.{name}", "optimizer.schedule.warmup_steps", "train.steps"),
        )
    return None
