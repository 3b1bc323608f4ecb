"""Signals by which a person or a scheduler asks the launcher of a terminal to stop.

The first one asks for a checkpoint and an end. A repetition asks for an end now:

    SIGINT, SIGINT                      two Ctrl-C of a person, at any distance
    SIGTERM, SIGTERM within 10 s        an impatient person; SIGUSR2 alike

Schedulers send several signals in one moment, and a reminder before they kill. Those change nothing.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from launchers.processes import STOPPED

SAME_REQUEST_SECONDS = 1.0
"""Time in which several signals are one request."""
REPEAT_SECONDS = 10.0
"""Time in which a second request asks for an end now."""


class StopRequests:
    """Requests to stop that this process has received."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        """Signal of the first request; None without one."""
        self.is_urgent = False
        """True once a request was repeated: the ranks must end now."""
        self._last_time = float("-inf")
        self._reminder: signal.Signals | None = None

    def note(self, number: signal.Signals, now: float) -> None:
        """Note a signal.

        Args:
            number: the signal.
            now: seconds of the monotonic clock.
        """
        gap, self._last_time = now - self._last_time, now
        if self.first is None:
            self.first = number
        elif number == signal.SIGINT == self.first or SAME_REQUEST_SECONDS <= gap <= REPEAT_SECONDS:
            self.is_urgent = True
        elif gap > REPEAT_SECONDS:
            self._reminder = number

    def take_reminder(self) -> signal.Signals | None:
        """Return the signal of a request that came again too late to end the ranks; None if there is no new one."""
        reminder, self._reminder = self._reminder, None
        return reminder


@contextmanager
def noted_requests() -> Iterator[StopRequests]:
    """Note the signals that ask for a stop within, and restore their handlers afterwards."""
    requests = StopRequests()

    def note(number: int, frame: FrameType | None) -> None:
        requests.note(signal.Signals(number), time.monotonic())

    earlier = {number: signal.signal(number, note) for number in STOPPED.values()}
    try:
        yield requests
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
