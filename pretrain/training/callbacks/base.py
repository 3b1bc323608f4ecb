"""Contract of callbacks, and their registry.

A start of a run calls each event on every callback, in the order of callbacks/__init__.py:

    on_start(run)
    the numbers of step 0 of a new run, or of a step whose validation a stop cut short:
        measure(run); on_numbers(run, numbers)
    while steps are left:
        before_step(run)
        every rank has its part of the batch and no rank was asked to stop, or the loop ends
        forward, backward and update
        after_step(run, numbers)
        measure(run)                 may be cut short by a stop; then the next start measures again
        on_numbers(run, numbers)
    on_stop(run)                     also after a fault that all ranks know of
    on_end(run, status)              always

Every rank calls every event at the same step, so a callback may use collectives of `run.world` in all events but
`on_end`. Only the first rank writes numbers.

A callback reads a run. It changes no parameter, no gradient and nothing of the data, so losses are the same with and
without it. What it raises ends the run. docs/extending.md has a callback of one file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel

from byteloom.core.registries.nodes import RegisteredNodes
from byteloom.core.registries.registry import Registry, RegistryError
from pretrain.training.run import TrainingRun


class Callback:
    """Something that happens around the steps of a run. Override the events that are needed."""

    def on_start(self, run: TrainingRun) -> None:
        """Act before the first step of a start: the model, the engine and the data are ready."""

    def before_step(self, run: TrainingRun) -> None:
        """Act before a step. The step may still end in a stop, without `after_step`."""

    def after_step(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        """Act after an optimizer step, before validation; `run.step` counts the step.

        Args:
            run: after the step.
            numbers: of the step, by their names in metrics.jsonl.
        """

    def measure(self, run: TrainingRun) -> Mapping[str, float]:
        """Return more numbers of the step, which are logged as NAME/KEY by the callback's name.

        A number must follow from the state of the run: after a stop, the next start may measure the same step again.

        Raises:
            StoppedError: the ranks agreed to stop meanwhile (see `Vote`); the numbers wait for the next start.
        """
        return {}

    def on_numbers(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        """Act on the numbers of a step, with those that callbacks measured."""

    def on_stop(self, run: TrainingRun) -> None:
        """Act after the last step of a start, while every rank is still here.

        Not called where a rank is lost or hangs, or where a newer start has taken over.
        """

    def on_end(self, run: TrainingRun, status: str) -> None:
        """Release what the callback holds.

        Called on whatever end, for each callback whose `on_start` was called. Other ranks may be gone.

        Args:
            run: at its end.
            status: FINISHED, KILLED (stopped by a request) or FAILED.
        """


@dataclass(frozen=True)
class CallbackEntry:
    """A callback that a recipe can turn on."""

    config: type[BaseModel]
    """Node under `callbacks` in a recipe."""
    build: Callable[[Any], Callback]
    """Makes the callback of a node."""


OWN_NAMES = (
    *("tracking", "heartbeat", "stragglers", "profile", "progress", "report", "samples", "validation", "checkpoint"),
    "diagnostics",
)
"""Names of the callbacks that every run has."""

CALLBACKS = Registry[CallbackEntry]("callback", "byteloom.callbacks")
"""Callbacks that a recipe can turn on by name."""

CallbackNodes = Annotated[dict[str, BaseModel], RegisteredNodes(CALLBACKS)]
"""Type of the recipe's field `callbacks`."""

AnyCallback = TypeVar("AnyCallback", bound=type[Callback])


def register_callback(name: str, config: type[BaseModel]) -> Callable[[AnyCallback], AnyCallback]:
    """Return a decorator that registers a class of callbacks.

    Args:
        name: by which a recipe turns it on, and under which its numbers are logged.
        config: its node; the class takes one as its only argument.

    Raises:
        RegistryError: the name is taken.
    """
    if name in OWN_NAMES:
        raise RegistryError(f"every run has a callback named {name}; choose another name for {config.__module__}'s")

    def register(callback: AnyCallback) -> AnyCallback:
        CALLBACKS.register(name, CallbackEntry(config, callback))
        return callback

    return register
