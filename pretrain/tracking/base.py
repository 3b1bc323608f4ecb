"""Contract of trackers, and their registry.

A tracker takes the numbers of a run. Byteloom makes it, calls it and closes it on one thread of its own, in the first
rank's process, so it may block and it may raise: training neither waits nor ends. What a tracker did not take, it is
given again, from metrics.jsonl; see registered.py. docs/extending.md has a tracker of one file.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel

from byteloom.core.registries.nodes import RegisteredNodes
from byteloom.core.registries.registry import Registry
from pretrain.tracking.samples import SampleSet


@dataclass(frozen=True)
class RunDescription:
    """Description of a start and its run, for trackers."""

    name: str
    """Name of the run."""
    identity: str
    """Identity of the run, the same in every start."""
    params: Mapping[str, Any]
    """Config fields by dotted name, and what follows from them."""
    tags: Mapping[str, str]
    """Tags of this start; they replace those of an earlier one."""
    begins_after: int
    """Step of the checkpoint that this start resumes from; -1 for a start without a checkpoint."""
    start: int
    """Number of this start; 1 for the first."""
    reason: str
    """Why the run was started."""
    folder: Path
    """Run folder."""
    taken_step: int = -1
    """Last step that the tracker has stored permanently; -1 for none. If it has later ones, it must drop or replace
    them, because they are sent again."""


class Tracker(ABC):
    """Something that takes the numbers of a run, such as a server or a file format."""

    replaces_steps: ClassVar[bool] = True
    """Whether the tracker can replace steps that it has taken. False: a step that a resumed run repeats is not sent."""

    @abstractmethod
    def log(self, step: int, numbers: Mapping[str, float], time: float) -> None:
        """Take the numbers of a step.

        Args:
            step: optimizer steps done.
            numbers: by their names in metrics.jsonl.
            time: when the step was done, in seconds since 1970. The numbers may come much later.
        """

    def log_samples(self, found: SampleSet, folder: Path) -> None:  # noqa: B027 a tracker may ignore them
        """Take the samples of a step.

        Args:
            found: the samples.
            folder: of their pictures and sounds.
        """

    def flush(self) -> None:  # noqa: B027 a tracker may write at once
        """Return once nothing of what was taken can be lost."""

    @abstractmethod
    def close(self, status: str) -> None:
        """Write what is left.

        Args:
            status: FINISHED, KILLED (stopped by a request) or FAILED; RUNNING after a fault, before another tracker
                of the same run is made.
        """


@dataclass(frozen=True)
class TrackerEntry:
    """A tracker that a recipe can turn on."""

    config: type[BaseModel]
    """Node under `tracking.trackers` in a recipe."""
    build: Callable[[Any, RunDescription], Tracker]
    """Makes the tracker of a node and a run."""


TRACKERS = Registry[TrackerEntry]("tracker", "byteloom.trackers", "pretrain.tracking.trackers")
"""Trackers, besides MLflow, that a recipe can turn on by name."""

TrackerNodes = Annotated[dict[str, BaseModel], RegisteredNodes(TRACKERS)]
"""Type of the recipe's field `tracking.trackers`."""

AnyTracker = TypeVar("AnyTracker", bound=type[Tracker])


def register_tracker(name: str, config: type[BaseModel]) -> Callable[[AnyTracker], AnyTracker]:
    """Return a decorator that registers a class of trackers.

    Args:
        name: by which a recipe turns it on.
        config: its node; the class takes one and the description of a run.

    Raises:
        RegistryError: the name is taken.
    """

    def register(tracker: AnyTracker) -> AnyTracker:
        TRACKERS.register(name, TrackerEntry(config, tracker))
        return tracker

    return register
