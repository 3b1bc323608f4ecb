"""Callbacks: actions around the steps of a run, one file each; base.py has the contract.

    tracking, heartbeat, stragglers, profile, progress, report, samples, those of the recipe, validation, checkpoint

Events are called in this order, `on_end` in the reverse one.
"""

from contextlib import ExitStack
from types import MappingProxyType

from pretrain.training.callbacks.base import CALLBACKS, Callback, CallbackEntry, CallbackNodes, register_callback
from pretrain.training.callbacks.checkpoint import CheckpointCallback
from pretrain.training.callbacks.heartbeat import HeartbeatCallback
from pretrain.training.callbacks.profile import ProfileCallback
from pretrain.training.callbacks.progress import ProgressCallback
from pretrain.training.callbacks.report import ReportCallback
from pretrain.training.callbacks.samples import SamplesCallback
from pretrain.training.callbacks.stragglers import StragglersCallback
from pretrain.training.callbacks.tracking import TrackingCallback
from pretrain.training.callbacks.validation import ValidationCallback
from pretrain.training.config import TrainingRecipe
from pretrain.training.run import TrainingRun

__all__ = ["CALLBACKS", "Callback", "CallbackEntry", "CallbackList", "CallbackNodes", "register_callback"]


class CallbackList:
    """The callbacks of a start, in their order.

    Args:
        recipe: turns callbacks on.
    """

    def __init__(self, recipe: TrainingRecipe) -> None:
        self._named: dict[str, Callback] = {
            "tracking": TrackingCallback(),
            "heartbeat": HeartbeatCallback(),
            "stragglers": StragglersCallback(recipe.supervise),
            "profile": ProfileCallback(recipe.profile),
            "progress": ProgressCallback(),
            "report": ReportCallback(recipe.report),
            "samples": SamplesCallback(recipe.samples),
            **{name: CALLBACKS.get(name).build(node) for name, node in recipe.callbacks.items()},
            "validation": ValidationCallback(),
            "checkpoint": CheckpointCallback(),
        }
        self._started: list[Callback] = []

    def on_start(self, run: TrainingRun) -> None:
        """Call the event on each callback."""
        for callback in self._named.values():
            self._started.append(callback)
            callback.on_start(run)

    def before_step(self, run: TrainingRun) -> None:
        """Call the event on each callback."""
        for callback in self._named.values():
            callback.before_step(run)

    def after_step(self, run: TrainingRun, numbers: dict[str, float]) -> None:
        """Call the event on each callback, which cannot change the numbers."""
        for callback in self._named.values():
            callback.after_step(run, MappingProxyType(numbers))

    def measure(self, run: TrainingRun, numbers: dict[str, float]) -> None:
        """Add to the numbers of a step what each callback measures, as NAME/KEY; numbers that are there stay.

        Raises:
            StoppedError: the ranks agreed to stop meanwhile; on all ranks.
        """
        for name, callback in self._named.items():
            for key, value in callback.measure(run).items():
                numbers.setdefault(f"{name}/{key}", value)

    def on_numbers(self, run: TrainingRun, numbers: dict[str, float]) -> None:
        """Call the event on each callback, which cannot change the numbers."""
        for callback in self._named.values():
            callback.on_numbers(run, MappingProxyType(numbers))

    def on_stop(self, run: TrainingRun) -> None:
        """Call the event on each callback."""
        for callback in self._named.values():
            callback.on_stop(run)

    def on_end(self, run: TrainingRun, status: str) -> None:
        """Call the event on each callback that was started, the last one first, also where one raises."""
        with ExitStack() as ending:
            for callback in self._started:
                ending.callback(callback.on_end, run, status)
