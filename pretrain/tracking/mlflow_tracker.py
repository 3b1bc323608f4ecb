"""MLflow as the tracker of a start: a thread delivers the journal to it."""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from byteloom.core.faults import FaultClass, class_of
from byteloom.core.packages import MissingPackageError
from byteloom.core.provenance import changes
from byteloom.core.retries import RequestError, RequestStoppedError, RetryPolicy, retry
from byteloom.core.storage.state_files import StateFileError
from pretrain.tracking.background import join_within_limit
from pretrain.tracking.base import RunDescription
from pretrain.tracking.config import TrackingConfig
from pretrain.tracking.delivery import Delivery, Start
from pretrain.tracking.shipper import MlflowShipper
from pretrain.tracking.store import PARENT_TAG, fault_of, shown

log = logging.getLogger(__name__)

DELIVERY_PAUSE_SECONDS = 2.0
"""Time between two deliveries."""
FAILURE_PAUSE_SECONDS = 60.0
"""Time between two deliveries after a fault that a retry cannot repair. A person may repair it during the run."""
DELIVERY_POLICY = RetryPolicy(attempts=sys.maxsize, backoff_seconds=2.0, deadline_seconds=math.inf)
"""Limits of the attempts at a delivery during the run; the end of the run stops them."""
FINAL_POLICY = RetryPolicy(attempts=4, backoff_seconds=0.5, deadline_seconds=30.0)
"""Limits of the attempts at a final delivery, for which a process or a person waits."""


class MlflowTracker:
    """Deliveries of a run's journal to MLflow, on a thread; only the final delivery makes the caller wait.

    Args:
        shipper: of the run folder.
        may_write: whether the run is still this process's; asked before MLflow and mlflow.json are touched.
    """

    def __init__(self, shipper: MlflowShipper, may_write: Callable[[], bool]) -> None:
        self._may_write = may_write
        self._shipper = shipper
        self._faults = set[str]()
        """Faults that were logged since MLflow answered last."""
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
        is_ending, pause = False, DELIVERY_PAUSE_SECONDS
        while not is_ending:
            is_ending, pause = self._end.wait(pause), DELIVERY_PAUSE_SECONDS
            try:
                self._deliver(is_ending)
            except RequestStoppedError:
                continue  # the run ends, and the final delivery follows
            except _RunLostError:
                return
            except MissingPackageError as error:
                log.warning("%s; training continues, and the numbers are in %s", error, self._shipper.journal)
                return
            except (
                Exception
            ) as error:  # whatever MLflow does wrong, training continues, and the journal has the numbers
                self._warn(cause_of(error))
                pause = FAILURE_PAUSE_SECONDS

    def _deliver(self, is_final: bool) -> None:
        """Make a delivery; repeat it while its fault is passing."""
        shipper = self._shipper

        def attempt() -> None:
            if not self._may_write():
                raise _RunLostError
            if is_final:
                shipper.finish()
            else:
                shipper.deliver()

        retry(
            attempt,
            FINAL_POLICY if is_final else DELIVERY_POLICY,
            shown(shipper.delivery.uri),
            stopped=None if is_final else self._end,
            before_retry=self._warn,
            final=(MissingPackageError, _RunLostError),
            is_logged=False,
        )
        if self._faults:
            log.info("MLflow at %s answers again", shown(shipper.delivery.uri))
            self._faults.clear()

    def _warn(self, error: BaseException) -> None:
        """Log a fault of MLflow, once until it answers again. A fault of the program is logged with its traceback."""
        if (fault := fault_of(error)) not in self._faults:
            self._faults.add(fault)
            log.warning(
                "MLflow at %s: %s. Training continues; the numbers are safe in %s",
                shown(self._shipper.delivery.uri),
                fault,
                self._shipper.journal,
                exc_info=error if class_of(error) is FaultClass.OWN else None,
            )


class _RunLostError(Exception):
    """The run is no longer this process's."""


def deliver_all(shipper: MlflowShipper) -> None:
    """Deliver all that MLflow lacks of a run that has ended. Repeat it while its fault is passing.

    Raises:
        MissingPackageError: MLflow is not installed.
        Exception: whatever MLflow raised at the last attempt.
    """
    try:
        retry(shipper.finish, FINAL_POLICY, shown(shipper.delivery.uri), final=(MissingPackageError,), is_logged=False)
        return
    except RequestError as error:
        cause = cause_of(error)
    raise cause  # here, where the request's error is not being handled: it would become the cause of its own cause


def cause_of(error: Exception) -> BaseException:
    """Return the error of the last attempt, if a request failed; else the error itself."""
    return error.__cause__ if isinstance(error, RequestError) and error.__cause__ is not None else error


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
    files = (folder / name for name in ("config.yaml", "train.log", "report.html"))
    return MlflowTracker(MlflowShipper(journal, state, *files), may_write)
