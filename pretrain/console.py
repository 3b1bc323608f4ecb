"""What commands say to people, on standard error; results go to standard output."""

import logging
import sys
from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from byteloom.core.packages import MissingPackageError
from byteloom.core.text import printable
from pretrain.progress import Display

said = Console(stderr=True)
display = Display(said)
"""Progress of what takes more than some seconds."""

Result = TypeVar("Result")


def speak_as(rank: int) -> None:
    """Where several processes share a terminal: all but the first say only what is wrong, and who they are."""
    if rank:
        display.close()
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
