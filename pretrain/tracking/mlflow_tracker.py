"""MLflow as the tracker of a start: a thread delivers the journal to it."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from byteloom.core.packages import MissingPackageError
from byteloom.core.provenance import changes
from byteloom.core.state_files import StateFileError
from pretrain.tracking.background import join_within_limit
from pretrain.tracking.base import RunDescription
from pretrain.tracking.config import TrackingConfig
from pretrain.tracking.delivery import Delivery, Start
from pretrain.tracking.shipper import MlflowShipper
from pretrain.tracking.store import PARENT_TAG, fault_of, shown

log = logging.getLogger(__name__)

DELIVERY_PAUSE_SECONDS = 2.0
"""Time between two deliveries."""
LONGEST_DELIVERY_PAUSE_SECONDS = 60.0
"""Longest time between two attempts at a delivery that fails."""


class MlflowTracker:
    """Deliveries of a run's journal to MLflow, on a thread; only the final delivery makes the caller wait.

    Args:
        shipper: of the run folder.
        may_write: whether the run is still this process's; asked before MLflow and mlflow.json are touched.
    """

    def __init__(self, shipper: MlflowShipper, may_write: Callable[[], bool]) -> None:
        self._may_write = may_write
        self._shipper = shipper
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._ship, name="mlflow", daemon=True)
        self._thread.start()

    def close(self, status: str, is_hurried: Callable[[], bool]) -> None:
        """Deliver what is left, for a bounded time.

        Args:
            status: MLflow's word for how the start ended: FINISHED, KILLED or FAILED.
            is_hurried: whether the process has been asked to stop, so that there is less time.
        """
        if not self._may_write():
            return
        try:
            self._shipper.set_status(status)
        except OSError as error:  # a full disk: the run's own fate must not change for it
            log.warning("mlflow.json does not say how the run ended: %s", error)
        self._end.set()
        join_within_limit(self._thread, time.monotonic(), is_hurried)
        if missing := self._shipper.undelivered():
            journal = self._shipper.journal
            log.warning(
                "%d steps did not reach MLflow at %s; they are safe in %s, and `byteloom track %s` sends them",
                missing,
                shown(self._shipper.delivery.uri),
                journal,
                journal.parent,
            )

    def _ship(self) -> None:
        shipper, pause, faults = self._shipper, DELIVERY_PAUSE_SECONDS, set[str]()
        while True:
            ending = self._end.wait(pause)
            if not self._may_write():
                return
            try:
                if ending:
                    shipper.finish()
                else:
                    shipper.deliver()
                if faults:
                    log.info("MLflow at %s answers again", shown(shipper.delivery.uri))
                pause, faults = DELIVERY_PAUSE_SECONDS, set()
            except MissingPackageError as error:
                log.warning("%s; training continues, and the numbers are in %s", error, shipper.journal)
                return
            except Exception as error:
                # Whatever MLflow does wrong, training continues, and the journal has the numbers.
                if (fault := fault_of(error)) not in faults:
                    log.warning(
                        "MLflow at %s: %s. Training continues; the numbers are safe in %s",
                        shown(shipper.delivery.uri),
                        fault,
                        shipper.journal,
                    )
                pause, faults = min(2 * pause, LONGEST_DELIVERY_PAUSE_SECONDS), faults | {fault}
            if ending:
                return


def open_mlflow(
    config: TrackingConfig, journal: Path, description: RunDescription, may_write: Callable[[], bool]
) -> MlflowTracker:
    """Return the MLflow tracker of a start of a run, whose mlflow.json it writes.

    Args:
        config: with MLflow enabled.
        journal: metrics.jsonl.
        description: of the run.
        may_write: as of `MlflowTracker`.
    """
    folder = description.folder
    state, uri = folder / "mlflow.json", config.store(folder.parent)
    try:
        delivery = Delivery.load(state)
    except StateFileError as error:
        log.warning("%s; this start does so", error)
        # A delivery that was begun and whose end is not known: MLflow is asked how far it came.
        sending = description.begins_after
        delivery = Delivery(uri, None, -1, sending, experiment=config.experiment, identity=description.identity)
    place = (uri, config.experiment, description.identity)
    if delivery is None or (delivery.uri, delivery.experiment, delivery.identity) != place:
        delivery = Delivery(uri, experiment=config.experiment, identity=description.identity)
    delivery.name, delivery.status = description.name, "RUNNING"
    params = {key: str(value) for key, value in description.params.items()}
    if delivery.params != params and max(delivery.delivered_step, delivery.sending_step) > description.begins_after:
        log.info("the recipe has changed: MLflow receives the steps after %d again", description.begins_after)
        delivery.delivered_step = delivery.sending_step = description.begins_after
    changed = tuple(changes(delivery.params, params)) if delivery.params else ()
    delivery.add(Start(description.start, time.time(), description.begins_after, description.reason, changed))
    delivery.params = params
    delivery.tags = {**description.tags, **({PARENT_TAG: config.parent} if config.parent else {})}
    delivery.save(state)
    return MlflowTracker(MlflowShipper(journal, state, folder / "config.yaml", folder / "train.log"), may_write)
