"""Launchers of this machine for a terminal: run the train entry in this process, or in several processes.

    launcher ─┬─ rank 0    writes to the terminal itself
              ├─ rank 1    the launcher prints its lines with its number
              └─ rank 2    …

All ranks end together. When one fails, the launcher prints its last lines and kills the others, which wait for it in a
collective. When one hangs, the others wait in the same way: the launcher says so, and past the limits of `supervise`
writes the stacks of all ranks and kills them. When the launcher dies, the ranks notice and exit.
"""

import logging
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from byteloom.core.validation import Seconds
from launchers.processes import STOPPED, Outcome, RankProcesses, describe_exit, rank_command
from launchers.stop_requests import REPEAT_SECONDS, StopRequests, noted_requests
from launchers.supervision.hangs import HangDetector
from launchers.supervision.heartbeat import TERMINAL_FOLDER, stack_of
from launchers.supervision.plan import SuperviseConfig

GRACE_SECONDS = 2.0
"""Time that the first rank has to exit when another one has failed: it may fail for the same reason."""
RANK_POLL_SECONDS = 0.05
"""Time between two looks at the ranks."""
HEARTBEAT_POLL_SECONDS = 1.0
"""Time between two looks at the ranks' heartbeats."""
REMINDED = f"the same signal twice within {REPEAT_SECONDS:.0f} s ends them at once"
ERASE_LINE, SHOW_CURSOR = "\r\x1b[K", "\x1b[?25h"

log = logging.getLogger(__name__)


class LaunchConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Training processes of this machine, unless torchrun or srun starts them."""

    processes: int = Field(default=1, ge=1, le=1024)
    """Ranks that `byteloom train` starts and watches on this machine: one for each GPU."""
    meeting_seconds: Seconds = 300.0
    """Time that a rank waits at the start for the others."""


def run_processes(entry: str, recipe: Path, count: int, log_of: Callable[[int], Path], limits: SuperviseConfig) -> int:
    """Run the train entry in several processes of this machine; return the exit code of the first that failed.

    The first SIGINT, SIGTERM or SIGUSR2 is sent to all ranks, which save and stop; a repetition kills them.

    Args:
        entry: "module:function", as in `run_in_process`.
        recipe: the resolved recipe.
        count: number of ranks.
        log_of: returns the path of a rank's log, for people.
        limits: times without a heartbeat after which a rank counts as hung.
    """
    with noted_requests() as requests, tempfile.TemporaryDirectory(prefix="byteloom-heartbeats-") as heartbeats:
        command = rank_command("launchers", entry, recipe)
        ranks = RankProcesses(command, count, {TERMINAL_FOLDER: heartbeats}, own_sessions=True)
        try:
            outputs = [_start(ranks, rank) for rank in range(count)]
            watch = _Watch(Path(heartbeats), ranks, limits)
            return _wait(ranks, outputs, requests, log_of, watch)
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


def _wait(
    ranks: RankProcesses,
    outputs: Sequence[_RankOutput],
    requests: StopRequests,
    log_of: Callable[[int], Path],
    watch: "_Watch",
) -> int:
    """Wait until all ranks have ended, one has failed or one hangs; return the exit code."""
    is_passed_on = False
    while True:
        asked = requests.first
        if asked and requests.is_urgent:
            log.warning("%s again: all ranks are ended at once, without a checkpoint", asked.name)
            return 128 + asked
        if asked and not is_passed_on:
            is_passed_on = True
            ranks.request_stop(asked)
        if reminder := requests.take_reminder():
            _print([f"{reminder.name}: the ranks are still saving; {REMINDED}"])
        outcome = ranks.outcome()
        if outcome is None:
            if watch.has_hung():
                _report_hang(watch, log_of(0).parent)
                return 128 + asked if asked else 1
            time.sleep(RANK_POLL_SECONDS)
        elif outcome.kind != "failed":
            return outcome.code
        elif asked and outcome.code == -asked:
            log.warning("%s: stopped before training started", asked.name)
            return 128 + asked
        else:
            return _fail(ranks, outputs, outcome, log_of)


class _Watch:
    """Watch over the heartbeats of the ranks."""

    def __init__(self, folder: Path, ranks: RankProcesses, limits: SuperviseConfig) -> None:
        self._folder, self._ranks = folder, ranks
        self._detector = HangDetector(folder, ranks.size, limits, lambda: ranks.send(signal.SIGQUIT))
        self._looked = time.monotonic()

    def has_hung(self) -> bool:
        """Return whether a rank hangs; tell a person when ranks take no step for a while."""
        if time.monotonic() - self._looked < HEARTBEAT_POLL_SECONDS:
            return False
        has_hung = self._detector.has_hung()
        if not has_hung and (notice := self._detector.notice()):
            _print([f"warning: {notice}"])
        self._looked = time.monotonic()
        return has_hung

    def examine(self) -> tuple[str, str]:
        """Return which rank hangs, and the stacks of all ranks. A rank that was stopped continues, to write its own."""
        reason = self._detector.examine().reason
        self._ranks.send(signal.SIGCONT)
        time.sleep(1.0)
        stacks = ""
        for rank in range(self._ranks.size):
            path = stack_of(self._folder, rank)
            text = path.read_text(encoding="utf-8", errors="backslashreplace") if path.exists() else ""
            stacks += f"\nrank {rank}:\n{text or 'no stack: it does not answer, even after SIGCONT'}\n"
        return reason, stacks


def _report_hang(watch: _Watch, folder: Path) -> None:
    """Write the stacks of all ranks to the run folder, or print them if that fails; log which rank hangs."""
    reason, stacks = watch.examine()
    page = folder / f"hang-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        page.write_text(f"{reason}\n{stacks}", encoding="utf-8")
    except OSError:  # a full disk, or no step was done and there is no folder
        _print(stacks.splitlines())
        log.error("%s; all ranks are ended, and their stacks are above", reason)
    else:
        log.error("%s; all ranks are ended, and their stacks are in %s", reason, page)


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


def _print(lines: Sequence[str]) -> None:
    """Print lines on standard error. They replace a live line of the first rank, which draws it again below."""
    erase = ERASE_LINE if sys.stderr.isatty() else ""
    sys.stderr.write("".join(f"{erase}{line}\n" for line in lines))
    sys.stderr.flush()
