"""What commands say to people, on standard error; results go to standard output."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich.console import Console

from byteloom.core.packages import MissingPackageError
from byteloom.core.state_files import StateFileError
from byteloom.core.text import printable
from pretrain.terminal import crash
from pretrain.terminal.progress import Display

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
    """Run a command and show what it logs.

    An error that a person can mend becomes one line and exit code 1. Any other error becomes one line, a crash file
    with the traceback, and exit code 70; in a thread of its own it does not end the process.

    Args:
        faults: the errors that a person can mend, besides OSError, MissingPackageError and StateFileError.
    """
    for name in ("pretrain", "data_pipeline", "launchers"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        logging.getLogger(name).addHandler(_handler)
    # OSError is a full disk or a folder that may not be written.
    mendable: tuple[type[Exception], ...] = (*faults, MissingPackageError, StateFileError, OSError)
    try:
        with _threads_reporting():
            return command()
    except mendable as error:
        for line in _explanation(error).splitlines():
            say(f"error: {line}")
        sys.exit(1)
    except Exception as error:
        _say_crash(error)
        sys.exit(crash.EXIT_CODE)


def _explanation(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or crash.summary(error)


def _say_crash(error: BaseException) -> None:
    for line in crash.report(error):
        say(line)


@contextlib.contextmanager
def _threads_reporting() -> Iterator[None]:
    """Report errors that end a thread as those that end the command."""
    earlier = threading.excepthook

    def report(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None:
            _say_crash(ended.exc_value)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = earlier


class _ConsoleHandler(logging.Handler):
    """Log lines for people, above a live progress line where there is one."""

    speaker = ""
    """Before each line, where several processes speak."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        say(f"{mark}{record.getMessage()}")


_handler = _ConsoleHandler(logging.INFO)
