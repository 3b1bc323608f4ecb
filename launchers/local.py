"""Launchers of this machine for a terminal: run the train entry in this process, or in several processes.

    launcher ─┬─ rank 0    writes to the terminal itself
              ├─ rank 1    the launcher prints its lines with its number
              └─ rank 2    …

All ranks end together. When one fails, the launcher prints its last lines and kills the others, which wait for it in a
collective. When the launcher dies, the ranks notice and exit.
"""

import importlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pydantic import BaseModel, Field

from byteloom.core.packages import long_lived_imports
from byteloom.core.validation import Seconds
from launchers.processes import STOPPED, Outcome, RankProcesses, describe_exit, rank_command

GRACE_SECONDS = 2.0
"""Time that the first rank has to exit when another one has failed: it may fail for the same reason."""
RANK_POLL_SECONDS = 0.05
"""Time between two looks at the ranks."""
ERASE_LINE, SHOW_CURSOR = "\r\x1b[K", "\x1b[?25h"

log = logging.getLogger(__name__)


class LaunchConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Number of training processes, unless another launcher (torchrun, srun) starts them."""

    processes: int = Field(default=1, ge=1, le=1024)
    """Ranks that `byteloom train` starts and watches on this machine: one for each GPU."""
    meeting_seconds: Seconds = 300.0
    """How long a rank waits at the start until all others are there."""


def run_in_process(entry: str, recipe: Path) -> int:
    """Run the train entry in this process, where a debugger can follow it; return its exit code.

    Args:
        entry: "module:function"; the function takes the path of a resolved recipe and returns an exit code.
        recipe: the resolved recipe.
    """
    name, _, function = entry.partition(":")
    with long_lived_imports():
        module = importlib.import_module(name)
    return int(getattr(module, function)(recipe))


def run_processes(entry: str, recipe: Path, count: int, log_of: Callable[[int], Path]) -> int:
    """Run the train entry in several processes of this machine; return the exit code of the first that failed.

    The first SIGINT, SIGTERM or SIGUSR2 is sent to all ranks; a second one kills them.

    Args:
        entry: "module:function", as in `run_in_process`.
        recipe: the resolved recipe.
        count: number of ranks.
        log_of: returns the path of a rank's log, for people.
    """
    requests: list[signal.Signals] = []
    ranks = RankProcesses(rank_command("launchers", entry, recipe), count, own_sessions=True)
    with _recorded_signals(requests):
        try:
            outputs = [_start(ranks, rank) for rank in range(count)]
            return _watch(ranks, outputs, requests, log_of)
        finally:
            _end(ranks)


def _start(ranks: RankProcesses, rank: int) -> "_RankOutput":
    """Start a rank whose standard input closes when this process dies."""
    if rank == 0:
        return _RankOutput(rank, ranks.start_next(subprocess.PIPE, None, None))
    return _RankOutput(rank, ranks.start_next(subprocess.PIPE, subprocess.PIPE, subprocess.STDOUT))


class _RankOutput:
    """Output of one rank.

    The first rank writes to the launcher's own output. Lines of the others are printed as they come. From an error on
    they are kept, for only the rank that failed first knows the reason.
    """

    def __init__(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        self._tag = f"rank {rank}: "
        self._process = process
        self._last_lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            text = line.decode("utf-8", "backslashreplace").rstrip()
            text = self._tag + text.removeprefix(self._tag)
            if self._last_lines or text.startswith((f"{self._tag}error: ", f"{self._tag}Traceback ")):
                self._last_lines.append(text)
            else:
                _print([text])

    def print_last_lines(self) -> None:
        """Print the lines that were kept."""
        self._reader.join(1.0)  # a process that the rank started may hold the pipe open for longer
        _print(self._last_lines)


def _watch(
    ranks: RankProcesses,
    outputs: Sequence[_RankOutput],
    requests: Sequence[signal.Signals],
    log_of: Callable[[int], Path],
) -> int:
    """Wait until all ranks have ended or one has failed; return the exit code."""
    is_passed_on = False
    while True:
        if len(requests) > 1:
            return 128 + requests[-1]
        if requests and not is_passed_on:
            is_passed_on = True
            ranks.send(requests[0])
        outcome = ranks.outcome()
        if outcome is None:
            time.sleep(RANK_POLL_SECONDS)
        elif outcome.kind != "failed":
            return outcome.code
        elif requests and outcome.code == -requests[0]:
            log.warning("%s: stopped before training started", requests[0].name)
            return 128 + requests[0]
        else:
            return _fail(ranks, outputs, outcome, log_of)


def _fail(ranks: RankProcesses, outputs: Sequence[_RankOutput], outcome: Outcome, log_of: Callable[[int], Path]) -> int:
    """Report the rank that failed first; return its exit code, as a shell reports it."""
    # If all ranks fail for one reason, such as a missing corpus, the first rank has reported it. A rank that only lost
    # contact with the others stays silent for longer than this.
    deadline = time.monotonic() + GRACE_SECONDS
    while ranks.codes[0] is None and time.monotonic() < deadline:
        time.sleep(RANK_POLL_SECONDS)
    rank, code = outcome.rank, outcome.code
    first = ranks.codes[0]
    if first is not None and first not in (0, *STOPPED):
        rank, code = 0, first
    _end(ranks)
    outputs[rank].print_last_lines()
    log.error("rank %d of %d %s; its log: %s", rank, ranks.size, describe_exit(code), log_of(rank))
    return 128 - code if code < 0 else code


def _end(ranks: RankProcesses) -> None:
    """Kill the ranks that run, and erase what the first one may have left on the terminal."""
    is_cut_short = any(code != 0 for code in ranks.codes[:1])
    ranks.kill()
    if is_cut_short and sys.stderr.isatty():
        sys.stderr.write(f"{ERASE_LINE}{SHOW_CURSOR}")
        sys.stderr.flush()


@contextmanager
def _recorded_signals(requests: list[signal.Signals]) -> Iterator[None]:
    """Record the signals that ask for an end, and restore their handlers afterwards."""

    def record(number: int, frame: FrameType | None) -> None:
        requests.append(signal.Signals(number))

    earlier = {number: signal.signal(number, record) for number in STOPPED.values()}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _print(lines: Sequence[str]) -> None:
    """Print lines on standard error. They replace a live line of the first rank, which draws it again below."""
    erase = ERASE_LINE if sys.stderr.isatty() else ""
    sys.stderr.write("".join(f"{erase}{line}\n" for line in lines))
    sys.stderr.flush()
