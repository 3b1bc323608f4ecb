"""The numbers of a start: its journal and its trackers, behind one object."""

from collections.abc import Callable, Mapping
from functools import partial

from pretrain.tracking.background import BackgroundTracker
from pretrain.tracking.base import TRACKERS, RunDescription
from pretrain.tracking.config import TrackingConfig
from pretrain.tracking.journal import Journal
from pretrain.tracking.mlflow_tracker import MlflowTracker, open_mlflow


class Recorder:
    """Writes numbers to the journal and passes them to the trackers, which never raise and never block.

    Args:
        mlflow: reads the journal by itself; None where the recipe turns MLflow off.
        trackers: those of other packages.
    """

    def __init__(self, journal: Journal, mlflow: MlflowTracker | None, trackers: list[BackgroundTracker]) -> None:
        self.journal = journal
        self._mlflow = mlflow
        self._trackers = trackers

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        self.journal.append(step, numbers)
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def close(self, status: str, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Deliver what is left, for a bounded time.

        Args:
            status: FINISHED, KILLED or FAILED.
            is_hurried: whether the process has been asked to stop, so that there is less time.
        """
        self.journal.close()
        for tracker in self._trackers:
            tracker.end(status)
        if self._mlflow is not None:
            self._mlflow.close(status, is_hurried)
        for tracker in self._trackers:
            tracker.wait(is_hurried)


def open_recorder(
    config: TrackingConfig,
    journal: Journal,
    description: RunDescription,
    may_write: Callable[[], bool] = lambda: True,
) -> Recorder:
    """Return the recorder of a start of a run, with the trackers that its recipe turns on.

    Args:
        config: the recipe's.
        journal: of the run; the recorder closes it.
        description: of the run, for trackers.
        may_write: whether the run is still this process's; trackers ask before they write.
    """
    mlflow = open_mlflow(config, journal.path, description, may_write) if config.enabled else None
    trackers = [
        BackgroundTracker(name, partial(TRACKERS.get(name).build, node, description), may_write)
        for name, node in config.trackers.items()
    ]
    return Recorder(journal, mlflow, trackers)
