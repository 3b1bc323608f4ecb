"""Requests to stop: a signal is noted, and the loop looks at it between steps.

Ctrl-C and a kind `kill` ask for it, and so does Slurm: SIGUSR2 before the time limit or a preemption, as `byteloom
submit` wishes, and SIGTERM at a preemption, a requeue or a cancellation.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)


class StopRequest:
    """Set by SIGINT, SIGTERM or SIGUSR2.

    Slurm sends what it has to say more than once, and to all ranks or to one; a second Ctrl-C is a person's, and ends
    the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first that came."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
        earlier = {number: signal.signal(number, self._note) for number in numbers}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # a launcher may have kept some for us
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if self.signal is None:
            self.signal = signal.Signals(number)
            again = "; once more stops at once, without a checkpoint" if number == signal.SIGINT else ""
            log.info("%s: stopping at the next step%s", self.signal.name, again)
