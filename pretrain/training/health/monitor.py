"""Statistics of a run's recent steps, and the decision about a bad batch.

All of it is a function of the numbers of past steps, which are the same on all ranks. A checkpoint holds its state, so
a resumed run decides as an uninterrupted one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from statistics import median
from typing import Any

from pretrain.engines import StepResult, UpdateLimits
from pretrain.training.health.config import HealthConfig
from pretrain.training.health.events import Action, HealthEvent, Kind

NORMAL_DEVIATIONS = 1.4826
"""Standard deviation of normal numbers, in median absolute deviations."""
LEAST_LOSS_DEVIATION, LEAST_NORM_DEVIATION = 0.05, 0.25
"""Least deviation, as a share of the median."""
SKIP_WINDOWS = 10
"""Windows of steps within which skips are counted, and within which a run may rewind to its beginning."""


class Monitor:
    """Health of a run.

    Args:
        config: the recipe's.
        state: `state` at the checkpoint that the run resumes from; empty without one.
        rewinds: as of `rewinds_of`; the state need not know the last ones.
    """

    def __init__(self, config: HealthConfig, state: Mapping[str, Any], rewinds: Sequence[HealthEvent] = ()) -> None:
        self._config = config
        self._losses: list[float] = list(state.get("bits_per_byte", []))
        self._norms: list[float] = list(state.get("gradient_norm", []))
        self._stages: int = state.get("stages", 1)
        self.events = [HealthEvent(**event) for event in state.get("events", [])]
        """Rewinds of the run, and its last other events, oldest first."""
        known = {event.id for event in self.events}
        self.events += [event for event in rewinds if event.id not in known]
        self.is_rewinding = False
        """Whether this start ends with a rewind."""

    def state(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON values.

        Args:
            step: steps done.
        """
        first = step - SKIP_WINDOWS * self._config.window
        events = [
            event.model_copy(update={"rows": []}).as_json()
            for event in self.events
            if event.to_step is not None or event.step > first
        ]
        numbers = {"bits_per_byte": self._losses, "gradient_norm": self._norms}
        return {**numbers, "stages": self._stages, "events": events}

    def accept(self, result: StepResult, stages: int) -> None:
        """Add the numbers of an update to the window.

        Args:
            result: of the step.
            stages: number of stages of the mixture that have begun. A new stage begins a new window, because its data
                may have another loss.
        """
        if stages != self._stages:
            self._stages = stages
            self._losses.clear()
            self._norms.clear()
        numbers = bits_per_byte(result), result.gradient_norm
        if not all(map(math.isfinite, numbers)):
            return
        for values, value in zip((self._losses, self._norms), numbers, strict=True):
            values.append(value)
            del values[: -self._config.window]

    @property
    def limits(self) -> UpdateLimits:
        """Limits of the next batch; none while the window holds too few steps."""
        if self._config.spike == "ignore" or 2 * len(self._losses) < self._config.window:
            return UpdateLimits()
        loss = limit_of(self._losses, self._config.loss_deviations, LEAST_LOSS_DEVIATION)
        norm = limit_of(self._norms, self._config.norm_deviations, LEAST_NORM_DEVIATION)
        return UpdateLimits(loss * math.log(2), norm)

    def describe(self, result: StepResult) -> tuple[Kind, str]:
        """Return which limit a batch has exceeded, and a clause that says by how much."""
        norm, loss = result.gradient_norm, bits_per_byte(result)
        if norm > self.limits.gradient_norm or not self._losses:
            name, value, values = "gradient norm", f"{norm:.3g}", self._norms
        else:
            name, value, values = "loss", f"{loss:.3g} bits per byte", self._losses
        middle = median(values)
        times = (norm if values is self._norms else loss) / middle if middle else math.inf
        kind: Kind = "gradient_norm" if values is self._norms else "loss"
        return kind, f"{name} {value} is {times:.3g} times the median of the last {len(values)} steps ({middle:.3g})"

    def action(self, kind: Kind, step: int) -> Action:
        """Return the action about a bad batch, or about values that are not finite.

        Args:
            kind: of the event.
            step: number of the step.
        """
        config = self._config
        if kind == "values":
            wanted = "stop" if config.non_finite == "stop" else "rewind"
        else:
            wanted = config.non_finite if kind == "non_finite" else config.spike
        if wanted == "skip":
            if self.skips_at(step) + 1 >= config.patience:
                wanted = "rewind"
            elif self.recent_skips(step) >= config.skips:
                return "stop"
        if wanted == "rewind":
            return "rewind" if self.rewinds < config.rewinds else "stop"
        return "skip" if wanted == "skip" else "stop"

    def skips_at(self, step: int) -> int:
        """Return how many batches were skipped at a step, one after another, since the last rewind."""
        skips = takewhile(lambda event: event.action == "skip" and event.step == step, reversed(self.events))
        return len(list(skips))

    def recent_skips(self, step: int) -> int:
        """Return how many batches were skipped within the last windows before a step."""
        first = step - SKIP_WINDOWS * self._config.window
        return sum(event.action == "skip" and event.step > first for event in self.events)

    @property
    def rewinds(self) -> int:
        """Number of rewinds of the run."""
        return sum(event.action == "rewind" for event in self.events)

    def rate_factor(self, step: int) -> float:
        """Return the factor of the learning rate of a step, by its number: that of the last rewind which covers it."""
        factors = [
            event.rate_factor
            for event in self.events
            if event.to_step is not None and event.to_step < step <= event.rate_until
        ]
        return factors[-1] if factors else 1.0

    def healthy_step(self, step: int) -> int:
        """Return the newest step after which the run was healthy for a whole window; negative if there is none.

        Args:
            step: steps done.
        """
        return self._trouble(step) - 1 - self._config.window

    def kept_steps(self, step: int) -> Callable[[Sequence[int]], list[int]]:
        """Return the choice of checkpoints that stay besides the newest ones, given the steps of all, oldest first.

        They are the last good checkpoint, and the oldest of those that may become good. Checkpoints from before the
        first half window are not chosen.

        Args:
            step: steps done.
        """
        healthy, first = self.healthy_step(step), self._config.window // 2

        def choose(saved: Sequence[int]) -> list[int]:
            good = [each for each in saved if each <= healthy]
            return good[-1:] + [each for each in saved if each > healthy and each >= first][:1]

        return choose

    def _trouble(self, step: int) -> int:
        """Return the first step of the trouble that is not over yet; the next step if there is none.

        A window of healthy steps ends a trouble.
        """
        first = step + 1
        for event in reversed(self.events):
            if event.step <= first - self._config.window or event.step > step + 1:
                break
            first = event.step
        return first

    def vain_rewind(self, step: int) -> HealthEvent | None:
        """Return the last rewind if the run has not passed its step, so that it has not helped; else None.

        Args:
            step: steps done, when the run has trouble again.
        """
        last = next((event for event in reversed(self.events) if event.to_step is not None), None)
        return last if last is not None and step < last.step else None

    def rewind_step(self, kind: Kind, step: int, saved: Sequence[int], floor: int = 0) -> int | None:
        """Return the step of the checkpoint to rewind to: the last good one, or the last one before the trouble.

        If the last rewind has not helped, the checkpoint is an earlier one. Values that are not finite are in no
        checkpoint, so the last one will do.

        Args:
            kind: of the event.
            step: steps done.
            saved: steps of the checkpoints.
            floor: step before which the run never rewinds; 0 if it may begin again.

        Returns:
            The step; 0 is the beginning of the run. None: there is no such checkpoint, and the run is too old to begin
            again.
        """
        end = self._trouble(step)
        if (last := self.vain_rewind(step)) is not None:
            end = min(end, last.to_step or 0)
        before = [each for each in saved if floor <= each < end] or [each for each in saved if each == floor]
        good = [each for each in before if each <= self.healthy_step(step) and kind != "values"]
        may_begin_again = not floor and step < SKIP_WINDOWS * self._config.window
        return max(good or before, default=0 if may_begin_again else None)

    def numbers(self, step: int) -> dict[str, float]:
        """Return metrics of a step by name; none while the run has had no event.

        Args:
            step: number of the step.
        """
        if not self.events:
            return {}
        return {"health/rewinds": self.rewinds, "health/rate_factor": self.rate_factor(step)}


def bits_per_byte(result: StepResult) -> float:
    """Return the loss of a batch in bits per byte."""
    return result.nats / max(result.target_bytes, 1) / math.log(2)


def limit_of(values: Sequence[float], deviations: float, least: float) -> float:
    """Return the largest number that is no spike after others.

    Args:
        values: the others.
        deviations: distance of the limit from their median, in deviations.
        least: least deviation, as a share of the median.
    """
    middle = median(values)
    spread = NORMAL_DEVIATIONS * median(abs(value - middle) for value in values)
    return middle + deviations * max(spread, least * middle)
