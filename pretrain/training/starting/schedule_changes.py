"""Warnings about a learning rate that rises where a start resumes: most often, a decayed run was made longer."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from byteloom.core.storage.step_folders import step_of
from pretrain.checkpoint import Metadata
from pretrain.checkpoint.homes.home import committed
from pretrain.optim import OptimizerConfig, ScheduleConfig, learning_rate_at
from pretrain.training.config import TrainingRecipe

ROUNDING = 1e-9
"""Relative difference of rates that arithmetic may make."""


def describe_rise(then: Mapping[str, Any], now: TrainingRecipe, step: int) -> str | None:
    """Return how the schedule rises again after a step at which it had decayed; None if it does not.

    A changed `learning_rate` alone is not a rise, nor is a warm-up.

    Args:
        then: tree of the recipe with which the step was made.
        now: recipe of the steps that follow.
        step: the step.
    """
    try:
        optimizer = OptimizerConfig.model_validate(then["optimizer"])
    except ValidationError:  # of another version, so its schedule is not known
        return None
    last = learning_rate_at(optimizer, step - 1, then["train"]["steps"])
    next_ = learning_rate_at(now.optimizer, step, now.train.steps)
    if step <= optimizer.schedule.warmup_steps or step < now.optimizer.schedule.warmup_steps:
        return None
    if next_ / now.optimizer.learning_rate <= last / optimizer.learning_rate * (1 + ROUNDING):
        return None
    return (
        f"the learning rate rises from {last:.3g} in step {step} to {next_:.3g} in step {step + 1}: it had begun to "
        "decay, and this recipe decays later"
    )


def describe_extended_decay(checkpoint: Metadata, recipe: TrainingRecipe, run: str) -> str | None:
    """Return a warning if a start continues weights that have decayed with a higher rate; None if it does not.

    Args:
        checkpoint: from which the start resumes.
        recipe: of the start.
        run: folder of the run, for the advice.
    """
    then = checkpoint.state["config"]
    rise = describe_rise(then, recipe, checkpoint.state["reading"]["step"])
    if rise is None:
        return None
    begin = _begin_of_decay(ScheduleConfig.model_validate(then["optimizer"]["schedule"]), then["train"]["steps"])
    steps = [step for step in map(step_of, committed(checkpoint.home)) if step <= begin]
    if steps:
        return f"{rise}. To continue from before the decay instead: byteloom branch {run} --step {steps[-1]} --name NEW"
    return (
        f"{rise}. `byteloom branch` continues from before a decay, and this run keeps no checkpoint of it: set "
        "checkpoint.keep_every in the next run"
    )


def _begin_of_decay(schedule: ScheduleConfig, steps: int) -> float:
    """Return the last step before the decay of a schedule that decays, in a run of so many steps."""
    return steps - schedule.decay_length(steps) if schedule.shape == "wsd" else schedule.warmup_steps
