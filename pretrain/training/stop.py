"""Requests to stop a run, by SIGINT, SIGTERM or SIGUSR2, and the ranks' decision about them.

    signal ─▶ pipe ─▶ a thread ─┬─ nothing to save yet: log a line, exit with 128 + signal
                                └─ else: note the request; the ranks vote on it in each step and in validations

Python calls its own signal handlers on the main thread between bytecodes, so only after a long call into C++. The pipe
is written at once, and the thread reads it while the main thread computes.

Ctrl-C and `kill` request a stop, and so does Slurm. It sends SIGUSR2 before the time limit or a preemption, because
`byteloom submit` asks for it, and SIGTERM at a preemption, a requeue or a cancellation. It sends them more than once,
to all ranks or to one.
"""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Signals that request a stop."""

log = logging.getLogger(__name__)


class StopRequest:
    """Request to stop this process. Until `defer` is called, a request ends the process at once.

    Args:
        restore_terminal: called before the process ends at once.
        ending: logged when the process ends at once.
    """

    def __init__(
        self, restore_terminal: Callable[[], None] = lambda: None, ending: str = "stopped; there was nothing to save"
    ) -> None:
        self.signal: Signals | None = None
        """Signal of the first request, or the one that the ranks agreed on; None without a request."""
        self.before_exit: list[Callable[[int], object]] = []
        """Functions that are called with the exit code before the process ends at once, each for seconds at most."""
        self._restore_terminal = restore_terminal
        self._ending = ending
        self._ends_at_once = True
        self._is_ending = False
        self._lock = threading.Lock()
        self._interrupts = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within. After a request they are ignored, since the process is about to exit."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        thread = threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True)
        thread.start()
        earlier_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # Without a handler of Python's, nothing would write to the pipe.
        earlier = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # launchers.rank blocks them during its imports
        try:
            yield
        finally:
            self.stand_still_if_ending()
            for number, handler in earlier.items():
                signal.signal(number, signal.SIG_IGN if self.signal else handler)
            signal.set_wakeup_fd(earlier_writer)
            os.write(writer, b"\0")
            thread.join()
            os.close(writer)
            os.close(reader)

    def defer(self) -> None:
        """Note requests from now on, because there is something to save."""
        with self._lock:
            self._ends_at_once = False
        self.stand_still_if_ending()

    def stand_still_if_ending(self) -> None:
        """Never return if the process is ending at once; else return immediately."""
        with self._lock:
            is_ending = self._is_ending
        if is_ending:
            threading.Event().wait()

    def request(self, number: Signals) -> None:
        """Note a request to stop, as if the signal had come; the ranks agree on it at the end of a step."""
        if self.signal is None:
            self.signal = number
            more = "; Ctrl-C once more stops at once, without a checkpoint" if number == signal.SIGINT else ""
            log.info("%s: the run saves and stops%s", number.name, more)

    def _listen(self, reader: int) -> None:
        while number := os.read(reader, 1)[0]:
            if number in SIGNALS:
                self._handle(Signals(number))

    def _handle(self, number: Signals) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 or (self._is_ending and number == signal.SIGINT):
            self._log(number, "stopped at once, without a checkpoint")
            os._exit(128 + number)
        if self._is_ending:
            return
        with self._lock:
            self._is_ending = self._ends_at_once
        if self._is_ending:
            threading.Thread(target=self._end, args=(number,), daemon=True).start()
        else:
            self.request(number)

    def _end(self, number: Signals) -> None:
        self._log(number, self._ending)
        for call in self.before_exit:
            with contextlib.suppress(Exception):
                call(128 + number)
        os._exit(128 + number)

    def _log(self, number: Signals, ending: str) -> None:
        with contextlib.suppress(Exception):
            self._restore_terminal()
            log.info("%s: %s", number.name, ending)


@contextmanager
def stopping_at_once(restore_terminal: Callable[[], None]) -> Iterator[None]:
    """End the process at once, with one line, on a request within: for commands that save nothing."""
    with StopRequest(restore_terminal, "stopped").listening():
        yield


class StoppedError(Exception):
    """The ranks agreed to stop in the middle of some work, which is dropped.

    Args:
        signal: of the request.
    """

    def __init__(self, signal: Signals) -> None:
        super().__init__(signal.name)
        self.signal = signal


@dataclass(frozen=True)
class Decision:
    """Decision of all ranks: take another step, or end."""

    ends: bool
    rewinds: bool = False
    """Whether another start follows in the same processes, from an earlier checkpoint."""
    signal: Signals | None = None
    """Signal of the request to stop; None where there is none."""

    @classmethod
    def stopped_by(cls, signal: Signals) -> "Decision":
        """Return the decision to end because of a request."""
        return cls(ends=True, signal=signal)

    @property
    def status(self) -> str:
        """State of the start after this decision: FINISHED or KILLED."""
        return "FINISHED" if self.signal is None and not self.rewinds else "KILLED"

    @property
    def exit_code(self) -> int:
        """Exit code of a process that ended so."""
        return 0 if self.signal is None else 128 + self.signal


CONTINUE = Decision(ends=False)
"""Take another step."""
REWIND = Decision(ends=True, rewinds=True)
"""End this start, and begin another one from an earlier checkpoint."""
FINISHED = Decision(ends=True)
"""End: all steps of the run are done."""
