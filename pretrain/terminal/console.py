"""Messages of commands on standard error. Results go to standard output."""

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from rich.console import Console

from byteloom.core.errors import CorrectableError
from byteloom.core.faults import is_of_storage
from byteloom.core.text import clean
from pretrain.terminal import crash
from pretrain.terminal.progress import Display


class _Messages(Console):
    """Console that drops a message when a disk refuses it: output in a file on a full disk must not end a run."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does."""
        try:
            super().print(*objects, **options)
        except OSError as error:
            if not is_of_storage(error):
                raise


messages = _Messages(stderr=True)
display = Display(messages)
"""Progress of work that takes more than a few seconds."""

Result = TypeVar("Result")


def set_rank(rank: int) -> None:
    """Set the rank of this process. Ranks after the first print only warnings and errors, after their number."""
    if rank:
        display.close()
        _handler.setLevel(logging.WARNING)
        _handler.prefix = f"rank {rank}: "


def say(text: str) -> None:
    """Print lines to standard error. Neither markup nor control characters in them have an effect.

    They may be part of the name of a file.
    """
    lines = (_handler.prefix + text).split("\n")
    messages.print("\n".join(map(clean, lines)), markup=False, highlight=False, soft_wrap=True)


def run(command: Callable[[], Result], code_of: Callable[[Exception], int] = lambda error: 1) -> Result:
    """Run a command and show what it logs.

    An error that a user can correct becomes one line and an exit code. Any other error becomes one line, a crash file
    with the traceback, and exit code 70. Such an error in another thread does not end the process.

    Args:
        command: the function to run.
        code_of: returns the exit code for an error that a user can correct.

    Raises:
        SystemExit: the command failed.
    """
    try:
        with logs_shown(), _threads_reporting():
            return command()
    except (CorrectableError, OSError) as error:  # OSError is a full disk or a folder that cannot be written
        for line in _explanation(error).splitlines():
            say(f"error: {line}")
        sys.exit(code_of(error))
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
def logs_shown() -> Iterator[None]:
    """Show what all packages log."""
    loggers = [logging.getLogger(name) for name in ("byteloom", "pretrain", "data_pipeline", "launchers")]
    earlier = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(_handler)
    try:
        yield
    finally:
        for logger, level in zip(loggers, earlier, strict=True):
            logger.setLevel(level)
            logger.removeHandler(_handler)


@contextlib.contextmanager
def _threads_reporting() -> Iterator[None]:
    """Report an error that ends a thread like an error that ends the command."""
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
    """Log handler that prints above the live progress lines."""

    prefix = ""
    """Text before each line, such as "rank 3: "."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        say(f"{level}{record.getMessage()}")


_handler = _ConsoleHandler(logging.INFO)
