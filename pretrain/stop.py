"""Requests to stop: a signal is noted, and the loop looks at it between steps."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class StopRequest:
    """Set by SIGINT (Ctrl-C) or SIGTERM. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        earlier = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        signal.signal(number, signal.SIG_DFL)
        log.info("%s: stopping at the next step; once more stops at once, without a checkpoint", self.signal.name)
