"""A tracker on a thread of its own: it can neither delay nor end the training."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping

from pretrain.tracking.base import Tracker

log = logging.getLogger(__name__)

FINAL_DELIVERY_SECONDS = 90.0
"""Time for the final delivery."""
HURRIED_DELIVERY_SECONDS = 10.0
"""Time for the final delivery after a request to stop: who asks for it may kill the process soon."""


def join_within_limit(thread: threading.Thread, begin: float, is_hurried: Callable[[], bool]) -> None:
    """Wait for a thread that makes a final delivery, for a bounded time.

    Args:
        thread: to wait for.
        begin: of the delivery, by time.monotonic.
        is_hurried: returns whether the process was asked to stop; called repeatedly.
    """
    while thread.is_alive():
        limit = HURRIED_DELIVERY_SECONDS if is_hurried() else FINAL_DELIVERY_SECONDS
        if time.monotonic() - begin > limit:
            break
        thread.join(0.1)


class BackgroundTracker:
    """Numbers for a tracker that is made, called and closed on a thread of its own.

    Args:
        name: of the tracker, for messages.
        build: makes the tracker.
        may_write: whether the run is still this process's; nothing is logged when it is not.
    """

    def __init__(self, name: str, build: Callable[[], Tracker], may_write: Callable[[], bool]) -> None:
        self._name = name
        self._build = build
        self._may_write = may_write
        self._numbers = queue.SimpleQueue[tuple[int, Mapping[str, float]] | None]()
        """Numbers that the tracker has not taken yet; None at the end."""
        self._status, self._ended = "", 0.0
        self._faults = set[str]()
        self._thread = threading.Thread(target=self._deliver, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Pass on the numbers of a step, and return at once."""
        self._numbers.put((step, dict(numbers)))

    def end(self, status: str) -> None:
        """Have the tracker take what is left and close, and return at once."""
        self._status, self._ended = status, time.monotonic()
        self._numbers.put(None)

    def wait(self, is_hurried: Callable[[], bool]) -> None:
        """Wait for the end of the tracker, for a bounded time.

        Args:
            is_hurried: whether the process has been asked to stop, so that there is less time.
        """
        join_within_limit(self._thread, self._ended, is_hurried)
        if self._thread.is_alive():
            log.warning("tracker %s did not take all numbers in time; they are safe in metrics.jsonl", self._name)

    def _deliver(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._build()
        except Exception as error:  # whatever a tracker does wrong, training continues
            self._warn(error)
        while (entry := self._numbers.get()) is not None:
            if tracker is not None and self._may_write():
                try:
                    tracker.log(*entry)
                except Exception as error:
                    self._warn(error)
        if tracker is not None and self._may_write():
            try:
                tracker.close(self._status)
            except Exception as error:
                self._warn(error)

    def _warn(self, error: Exception) -> None:
        """Log a fault of the tracker, each once."""
        fault = f"{type(error).__name__}: {error}".partition("\n")[0]
        if fault not in self._faults:
            self._faults.add(fault)
            log.warning("tracker %s: %s. Training continues; the numbers are safe in metrics.jsonl", self._name, fault)
