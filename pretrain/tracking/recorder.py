"""The numbers of a start: its journal and its trackers, behind one object."""

from collections.abc import Callable, Mapping, Sequence

from pretrain.tracking.base import RunDescription
from pretrain.tracking.config import TrackingConfig
from pretrain.tracking.journal import Journal
from pretrain.tracking.mlflow.tracker import open_mlflow
from pretrain.tracking.outbox import Outbox
from pretrain.tracking.registered import open_registered


class Recorder:
    """Writes numbers to the journal, from which the outboxes of the trackers read them.

    Args:
        journal: of the run.
        outboxes: one a tracker.
    """

    def __init__(self, journal: Journal, outboxes: Sequence[Outbox]) -> None:
        self.journal = journal
        self._outboxes = outboxes

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        self.journal.append(step, numbers)

    def close(self, status: str, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Deliver what is left, to all trackers at the same time, for a bounded time.

        Args:
            status: FINISHED, KILLED or FAILED.
            is_hurried: whether the process has been asked to stop, so that there is less time.
        """
        self.journal.close()
        for outbox in self._outboxes:
            outbox.end(status)
        for outbox in self._outboxes:
            outbox.wait(is_hurried)


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
        may_write: whether the run is still this process's; asked before trackers are used.
    """
    mlflow = [open_mlflow(config, description, may_write)] if config.enabled else []
    others = [open_registered(name, node, description, may_write) for name, node in config.trackers.items()]
    return Recorder(journal, [*mlflow, *others])
