"""Deliveries of a run's journal to a tracker, on a thread of their own: a tracker can neither delay nor end training.

    journal and samples on disk ─▶ Outbox (a thread) ─▶ Shipper ─▶ tracker
                                                           └─▶ state file: the last step that the tracker has

Every tracker has an outbox. A delivery that fails is repeated. What a killed process did not deliver, the next start
of the run delivers, or `byteloom track`.
"""

import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from byteloom.core.faults import FaultClass, class_of
from byteloom.core.packages import MissingPackageError
from byteloom.core.retries import RequestError, RequestStoppedError, RetryPolicy, retry
from pretrain.tracking.mlflow.store import fault_of

log = logging.getLogger(__name__)

DELIVERY_PAUSE_SECONDS = 2.0
"""Time between two deliveries."""
FAILURE_PAUSE_SECONDS = 60.0
"""Time between two deliveries after a fault that a retry cannot repair. A person may repair it during the run."""
DELIVERY_POLICY = RetryPolicy(attempts=sys.maxsize, backoff_seconds=2.0, deadline_seconds=math.inf)
"""Limits of the attempts at a delivery during the run; the end of the run stops them."""
FINAL_POLICY = RetryPolicy(attempts=4, backoff_seconds=0.5, deadline_seconds=30.0)
"""Limits of the attempts at a final delivery, for which a process or a person waits."""
FINAL_DELIVERY_SECONDS = 90.0
"""Longest wait for the final delivery."""
HURRIED_DELIVERY_SECONDS = 10.0
"""Longest wait for the final delivery after a request to stop: who asks for it may kill the process soon."""


class Shipper(Protocol):
    """Deliveries from a run folder to one tracker. Methods that deliver raise whatever the tracker raises."""

    journal: Path

    @property
    def place(self) -> str:
        """Name of the tracker in messages, without passwords."""

    def deliver(self) -> int:
        """Send what the tracker has not received; return the number of steps sent."""

    def finish(self) -> None:
        """Deliver, and end the tracker's run with the state that `set_status` stored."""

    def set_status(self, status: str) -> None:
        """Store the state that the tracker's run should have: FINISHED, KILLED or FAILED."""

    def undelivered(self) -> int:
        """Return the number of steps that the tracker has not received."""


class Outbox:
    """Deliveries of a start. Only the final delivery makes the caller wait, for a bounded time.

    Args:
        shipper: of the run folder.
        may_write: whether the run is still this process's; asked before the tracker and its state file are touched.
    """

    def __init__(self, shipper: Shipper, may_write: Callable[[], bool]) -> None:
        self._may_write = may_write
        self._shipper = shipper
        self._faults = set[str]()
        """Faults that were logged since the tracker answered last."""
        self._end = threading.Event()
        self._ended = 0.0
        self._thread = threading.Thread(target=self._ship, name=shipper.place, daemon=True)
        self._thread.start()

    def end(self, status: str) -> None:
        """Begin the final delivery, and return at once.

        Args:
            status: how the start ended: FINISHED, KILLED or FAILED.
        """
        if not self._may_write():
            return
        try:
            self._shipper.set_status(status)
        except OSError as error:  # a full disk: the run's own fate must not change for it
            log.warning("%s does not learn how the run ended: %s", self._shipper.place, error)
        self._ended = time.monotonic()
        self._end.set()

    def wait(self, is_hurried: Callable[[], bool]) -> None:
        """Wait for the final delivery, for a bounded time.

        Args:
            is_hurried: whether the process has been asked to stop, so that there is less time; called repeatedly.
        """
        if not self._end.is_set():
            return
        while self._thread.is_alive():
            limit = HURRIED_DELIVERY_SECONDS if is_hurried() else FINAL_DELIVERY_SECONDS
            if time.monotonic() - self._ended > limit:
                break
            self._thread.join(0.1)
        if missing := self._shipper.undelivered():
            journal = self._shipper.journal
            log.warning(
                "%d steps did not reach %s; they are safe in %s, and `byteloom track %s` sends them",
                missing,
                self._shipper.place,
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
            ) as error:  # whatever a tracker does wrong, training continues, and the journal has the numbers
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
            shipper.place,
            stopped=None if is_final else self._end,
            before_retry=self._warn,
            final=(MissingPackageError, _RunLostError),
            is_logged=False,
        )
        if self._faults:
            log.info("%s answers again", shipper.place)
            self._faults.clear()

    def _warn(self, error: BaseException) -> None:
        """Log a fault of the tracker, once until it answers again. A fault of its code is logged with a traceback."""
        if (fault := fault_of(error)) not in self._faults:
            self._faults.add(fault)
            log.warning(
                "%s: %s. Training continues; the numbers are safe in %s",
                self._shipper.place,
                fault,
                self._shipper.journal,
                exc_info=error if class_of(error) is FaultClass.OWN else None,
            )


class _RunLostError(Exception):
    """The run is no longer this process's."""


def deliver_all(shipper: Shipper) -> None:
    """Deliver all that a tracker lacks of a run that has ended. Repeat it while its fault is passing.

    Raises:
        MissingPackageError: the tracker's package is not installed.
        Exception: whatever the tracker raised at the last attempt.
    """
    try:
        retry(shipper.finish, FINAL_POLICY, shipper.place, final=(MissingPackageError,), is_logged=False)
        return
    except RequestError as error:
        cause = cause_of(error)
    raise cause  # here, where the request's error is not being handled: it would become the cause of its own cause


def cause_of(error: Exception) -> BaseException:
    """Return the error of the last attempt, if a request failed; else the error itself."""
    return error.__cause__ if isinstance(error, RequestError) and error.__cause__ is not None else error
