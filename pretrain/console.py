"""What commands say to people, on standard error; results go to standard output."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from byteloom.core.packages import MissingPackageError
from byteloom.core.text import printable
from pretrain.progress import duration, size

PLAIN_LINE_SECONDS = 30.0
"""Where there is no terminal, progress is told this often."""

said = Console(stderr=True)

Result = TypeVar("Result")


def speak_as(rank: int) -> None:
    """Where several processes share a terminal: all but the first say only what is wrong, and who they are."""
    if rank:
        _handler.setLevel(logging.WARNING)
        _handler.speaker = f"rank {rank}: "


def say(text: str) -> None:
    """A line for people, as it is: file names are no markup."""
    said.print(printable(_handler.speaker + text), markup=False, highlight=False, soft_wrap=True)


def run(command: Callable[[], Result], faults: tuple[type[Exception], ...]) -> Result:
    """Runs a command, and shows what it logs; a fault that a person can mend is one line and exit code 1.

    Args:
        faults: those errors, besides OSError and MissingPackageError.
    """
    for name in ("pretrain", "data_pipeline", "launchers"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).addHandler(_handler)
    # What the operating system says: a full disk, a folder that may not be written.
    mendable: tuple[type[Exception], ...] = (*faults, MissingPackageError, OSError)
    try:
        return command()
    except mendable as error:
        for line in str(error).splitlines():
            say(f"error: {line}")
        sys.exit(1)


class _ConsoleHandler(logging.Handler):
    """Log lines for people, above a live progress line where there is one."""

    speaker = ""
    """Before each line, where several processes speak."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        say(f"{mark}{record.getMessage()}")


_handler = _ConsoleHandler(logging.INFO)


@contextlib.contextmanager
def byte_progress(what: str) -> Iterator[Progress]:
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=said, disable=not said.is_terminal) as bar:
        yield bar


class PlainProgress:
    """Progress where there is no terminal: a line now and then."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._begin = self._last = time.monotonic()
        self._done_at_begin: int | None = None

    def update(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._done_at_begin is None:
            self._done_at_begin = done
        if now - self._last < PLAIN_LINE_SECONDS or not total:
            return
        self._last = now
        speed = (done - self._done_at_begin) / (now - self._begin)
        left = f", {duration((total - done) / speed)} left" if speed > 0 else ""
        say(f"{self._what}: {done / total:.0%} of {size(total)}, {size(speed)}/s{left}")
