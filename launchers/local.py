"""Starts on this machine: in this very process, or as several ranks that are watched over.

    launcher ─┬─ rank 0    speaks to the terminal itself
              ├─ rank 1    its lines come by way of the launcher, which says whose they are
              └─ rank 2    …

All ranks end together: when one fails, the launcher shows what it said last and ends the others, which wait for it in
some collective and cannot even be asked. When the launcher dies, they notice and end.
"""

import importlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, Field

from byteloom.core.packages import long_lived_imports
from byteloom.core.validation import Seconds

GRACE_SECONDS = 2.0
"""Given to the other ranks when one has failed, to close what they have open, or to fail of the same cause."""
STOP_SECONDS = 5.0
"""Given to the other ranks when one has stopped on request; they have nothing more to save."""
POLL_SECONDS = 0.05
STOPPED = {128 + number: number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
"""Exit codes of ranks that were asked to stop, and agreed to."""
ERASE_LINE, SHOW_CURSOR = "\r\x1b[K", "\x1b[?25h"

log = logging.getLogger(__name__)


class LaunchConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How many processes train, where no other launcher (torchrun, srun) starts them."""

    processes: int = Field(default=1, ge=1, le=1024)
    """Ranks that `byteloom train` starts on this machine and watches over: one for each GPU."""
    meeting_seconds: Seconds = 300.0
    """How long a rank waits at the start until all the others are there."""


def run_in_process(entry: str, recipe: Path) -> int:
    """Runs the train entry in this very process, where a debugger can follow it.

    Args:
        entry: "module:function"; the function takes the path of a resolved recipe and returns an exit code.
    """
    name, _, function = entry.partition(":")
    with long_lived_imports():
        module = importlib.import_module(name)
    return int(getattr(module, function)(recipe))


def run_processes(entry: str, recipe: Path, count: int, log_of: Callable[[int], Path]) -> int:
    """Runs the train entry in so many processes of this machine; returns the exit code of the first that failed.

    SIGINT, SIGTERM and SIGUSR2 are passed on to all, once; a second one ends them.

    Args:
        entry: as of `run_in_process`.
        log_of: where a rank keeps its log, for people.
    """
    port = free_port()
    requests: list[signal.Signals] = []
    ranks: list[_Rank] = []
    with _listening(requests):
        try:
            ranks.extend(_Rank(rank, count, port, entry, recipe) for rank in range(count))
            return _watch(ranks, requests, log_of)
        finally:
            _end(ranks)


class _Rank:
    """One process, and what it says.

    The first one's output is the launcher's own. Of the others, what is said on the way is passed on line by line; what
    comes from an error on is kept, for only the rank that failed first knows why.
    """

    def __init__(self, rank: int, count: int, port: int, entry: str, recipe: Path) -> None:
        self.rank = rank
        self.process = subprocess.Popen(
            # -P: a folder named launchers where the command was given is none of ours.
            [sys.executable, "-P", "-m", "launchers", entry, str(recipe)],
            env=rank_environment(rank, count, port),
            stdin=subprocess.PIPE,  # it closes when this process dies
            stdout=subprocess.PIPE if rank else None,
            stderr=subprocess.STDOUT if rank else None,
            start_new_session=True,  # Ctrl-C in a terminal reaches the launcher alone, which passes it on
        )
        self._last_words: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            text = line.decode("utf-8", "backslashreplace").rstrip()
            tag = f"rank {self.rank}: "
            text = tag + text.removeprefix(tag)
            if self._last_words or text.startswith((f"{tag}error: ", f"{tag}Traceback ")):
                self._last_words.append(text)
            else:
                _say([text])

    @property
    def code(self) -> int | None:
        """Exit code, negative if a signal killed it; None while it runs."""
        return self.process.poll()

    @property
    def failed(self) -> bool:
        return self.code not in (None, 0, *STOPPED)

    def say_last_words(self) -> None:
        self._reader.join(1.0)  # longer only if a process that it started holds the pipe open
        _say(self._last_words)

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends it, and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _watch(ranks: Sequence[_Rank], requests: Sequence[signal.Signals], log_of: Callable[[int], Path]) -> int:
    """Until all ranks have ended, or one has failed; returns the exit code."""

    def send(number: signal.Signals) -> None:
        for each in ranks:
            each.send(number)

    passed_on = False
    stop = StopOfRanks(send)
    while True:
        if len(requests) > 1:
            return 128 + requests[-1]
        if requests and not passed_on:
            passed_on = True
            send(requests[0])
        codes = [each.code for each in ranks]
        if any(code in STOPPED for code in codes):
            if stop.is_over(codes):
                return max(code for code in codes if code in STOPPED)
        elif failed := [each for each in ranks if each.failed]:
            if requests and failed[0].code == -requests[0]:
                log.warning("%s: stopped before training started", requests[0].name)
                return 128 + requests[0]
            return _fail(ranks, failed[0], log_of)
        elif None not in codes:
            return 0
        time.sleep(POLL_SECONDS)


class StopOfRanks:
    """The end of ranks of which one has stopped on request.

    Before its first step a rank stops without the others: nothing is lost. They wait for it in some collective, so they
    are asked as well, and have a few seconds to end.

    Args:
        send: sends a signal to all ranks that run.
    """

    def __init__(self, send: Callable[[signal.Signals], None]) -> None:
        self._send = send
        self._deadline: float | None = None

    def is_over(self, codes: Sequence[int | None]) -> bool:
        """Return whether all ranks have ended or had their time.

        Args:
            codes: of all ranks; None while a rank runs. At least one has stopped.
        """
        if self._deadline is None:
            self._deadline = time.monotonic() + STOP_SECONDS
            number = next(STOPPED[code] for code in codes if code in STOPPED)
            # A second SIGINT would end at once a rank that is about to end by itself.
            self._send(signal.SIGTERM if number == signal.SIGINT else number)
        return None not in codes or time.monotonic() > self._deadline


def _fail(ranks: Sequence[_Rank], first: _Rank, log_of: Callable[[int], Path]) -> int:
    """Tells of the rank that failed first; returns its exit code, as shells tell it."""
    # A fault of all, such as a corpus that is not there, is the first rank's to tell, which has done so. One that
    # merely lost contact keeps quiet for longer than this.
    deadline = time.monotonic() + GRACE_SECONDS
    while ranks[0].code is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    culprit = ranks[0] if ranks[0].failed else first
    code = culprit.code
    assert code is not None
    _end(ranks)
    culprit.say_last_words()
    ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    log.error("rank %d of %d %s; its log: %s", culprit.rank, len(ranks), ending, log_of(culprit.rank))
    return 128 - code if code < 0 else code


def _end(ranks: Sequence[_Rank]) -> None:
    """Kills those that run, and clears away what the first one may have left on the terminal."""
    cut_short = any(each.rank == 0 and each.code != 0 for each in ranks)
    for each in ranks:
        each.kill()
    if cut_short and sys.stderr.isatty():
        sys.stderr.write(f"{ERASE_LINE}{SHOW_CURSOR}")
        sys.stderr.flush()


@contextmanager
def _listening(requests: list[signal.Signals]) -> Iterator[None]:
    """Within, signals that ask for an end are noted."""

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(signal.Signals(number))

    earlier = {number: signal.signal(number, note) for number in STOPPED.values()}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun would set. Threads of all ranks together are as many as the cores that they may use."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))}
    return threads | os.environ | {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    """One of this machine for ranks to meet at; another one at each start, so that nobody is met there who
    belongs to an earlier one. Below those that Linux gives to connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
        return port


def _say(lines: Sequence[str]) -> None:
    """Lines on standard error, in the place of a live line of the first rank, which draws it again below."""
    erase = ERASE_LINE if sys.stderr.isatty() else ""
    sys.stderr.write("".join(f"{erase}{line}\n" for line in lines))
    sys.stderr.flush()
