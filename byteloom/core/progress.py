"""Telling how far work has come."""

import threading
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), one call at a time."""


def ignore(done: int, total: int) -> None:
    """Report to nobody."""


class Tally:
    """Sum of the work of several threads, reported as it grows."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Add bytes done, and report the sum."""
        with self._lock:
            self._done += size
            self._progress(self._done, self._total)
