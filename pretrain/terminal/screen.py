"""Full-screen view that refreshes: a thread reads, and this one draws, until q or Ctrl-C.

read ─▶ pipe ─▶ select ◀── key, new size of the terminal
                  │
                  ▼
                draw on the alternate screen of the terminal, which is restored at the end
"""

import os
import select
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Generic, TypeVar

from rich.console import Console, RenderableType
from rich.live import Live

T = TypeVar("T")

QUIT = b"qQ\x03\x04"
"""Keys that end a view: q, Ctrl-C and Ctrl-D."""
READ = b"r"
"""Byte in the pipe after a reading; a signal writes its number."""


def watch(
    read: Callable[[], T], draw: Callable[[T, Console], RenderableType], every: float, console: Console | None = None
) -> None:
    """Show content on the whole terminal until a person ends it.

    Args:
        read: returns the content. It runs in another thread, so a slow answer blocks no key.
        draw: returns the picture of the content for the size of the console.
        every: seconds between two readings.
        console: a terminal; standard output by default.

    Raises:
        Exception: what `read` raised.
        SystemExit: SIGTERM or SIGHUP ended the process.
    """
    console = console or Console()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        readings = _Readings(read, every, writer)
        stack.callback(readings.stop)
        stack.enter_context(_signals(writer))
        keys = stack.enter_context(_keys())
        with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
            readings.start()
            _show(live, readings, draw, [reader, *keys])


def _show(
    live: Live, readings: "_Readings[T]", draw: Callable[[T, Console], RenderableType], sources: list[int]
) -> None:
    """Draw each new content, and again for each new size, until a key ends the view."""
    pipe, *keys = sources
    while True:
        ready, _, _ = select.select(sources, [], [])
        if pipe in ready:
            os.read(pipe, 4096)
        for key in [key for key in keys if key in ready]:
            typed = os.read(key, 64)
            if not typed:  # its terminal is gone
                sources.remove(key)
                keys.remove(key)
            if any(letter in QUIT for letter in typed):
                return
            readings.hurry()
        readings.check()
        if readings.content:
            live.update(draw(readings.content[-1], live.console), refresh=True)


class _Readings(Generic[T]):
    """Thread that reads content again and again.

    Args:
        read: returns the content.
        every: seconds between two readings.
        pipe: end of a pipe that gets a byte after each reading.
    """

    def __init__(self, read: Callable[[], T], every: float, pipe: int) -> None:
        self.content: list[T] = []
        """The newest content; empty before the first."""
        self._read, self._every, self._pipe = read, every, pipe
        self._error: BaseException | None = None
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._is_stopped = False
        # A daemon, so that a server that never answers does not keep the command from ending.
        self._thread = threading.Thread(target=self._run, name="readings", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def hurry(self) -> None:
        """Read at once."""
        self._wake.set()

    def stop(self) -> None:
        """Stop reading; a reading that is in progress is not shown."""
        with self._lock:
            self._is_stopped = True
        self._wake.set()

    def check(self) -> None:
        """Raise the error that ended the thread, if one did."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._is_stopped:
            self._wake.clear()
            try:
                content = self._read()
            except Exception as error:  # raised again by `check`
                self._error = error
            else:
                self.content = [content]
            with self._lock:
                if not self._is_stopped:  # else the pipe is closed
                    with suppress(BlockingIOError):
                        os.write(self._pipe, READ)
            if self._error is not None:
                return
            self._wake.wait(self._every)


@contextmanager
def _signals(pipe: int) -> Iterator[None]:
    """Wake up for a new size of the terminal; end in order on SIGTERM and SIGHUP, so that it is restored."""

    def end(number: int, _: Any) -> None:
        sys.exit(128 + number)

    handlers = {signal.SIGWINCH: lambda *_: None, signal.SIGTERM: end, signal.SIGHUP: end}
    earlier = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    earlier_pipe = signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier_pipe)
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def _keys() -> Iterator[list[int]]:
    """Read keys from standard input at once and without echo; yield it, or nothing if it is no terminal."""
    try:
        descriptor = sys.stdin.fileno()
        earlier = termios.tcgetattr(descriptor)
    except (termios.error, OSError, ValueError, AttributeError):
        yield []
        return
    try:
        tty.setcbreak(descriptor, termios.TCSANOW)
        settings = termios.tcgetattr(descriptor)
        settings[6][termios.VSUSP] = b"\0"  # Ctrl-Z would leave the shell on the alternate screen
        termios.tcsetattr(descriptor, termios.TCSANOW, settings)
        yield [descriptor]
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, earlier)
