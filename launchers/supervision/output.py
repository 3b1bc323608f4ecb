"""Output of ranks: one file for each, which restarts at a maximum size, and its last lines."""

import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from launchers.supervision.heartbeat import beat_of, folder_of

LOG_BYTES = "BYTELOOM_LOG_BYTES"
"""Environment variable of a rank: maximum size of its output, in bytes."""
TAIL_BYTES = 64 << 10
"""Bytes at the end of an output that are read."""
ROTATION_POLL_SECONDS = 1.0
"""Time between two looks at the size of an output."""


def output_of(folder: Path, rank: int) -> Path:
    """Return the file with a rank's standard output and error, by the folder of the submission."""
    return folder / "ranks" / f"{beat_of(folder, rank).stem}.log"


def last_lines(path: Path) -> list[str]:
    """Return the last lines of a file, at most TAIL_BYTES; nothing if it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
        file.seek(begin)
        lines = file.read(TAIL_BYTES).decode(errors="backslashreplace").splitlines()
        return lines[1:] if begin else lines
    return []


def last_error(output: Path) -> str:
    """Return the last line of a rank's output that reports an error; empty if there is none."""
    wrong = re.compile(r"(rank \d+: )?(error|\w*Error|\w*Exception)\b")
    lines = [*last_lines(_earlier(output)), *last_lines(output)]
    return next((line for line in reversed(lines) if wrong.match(line)), "")


@contextmanager
def rotated_output(environment: Mapping[str, str], rank: int) -> Iterator[None]:
    """Write what this process prints to its output within a block. The file restarts at a maximum size.

    One earlier file is kept: rank-00000.log.1. Processes that this one has started keep writing to the file that they
    have.

    Args:
        environment: of a rank that a supervisor started. Another rank prints where it did.
        rank: of this process.
    """
    heartbeats = folder_of(environment)
    if LOG_BYTES not in environment or heartbeats is None:
        yield
        return
    path, limit, is_over = output_of(heartbeats.parents[1], rank), int(environment[LOG_BYTES]), threading.Event()

    def watch() -> None:
        while not is_over.wait(ROTATION_POLL_SECONDS):
            with suppress(OSError):  # a full disk: the file grows on, or not at all, until the next look
                if os.fstat(1).st_size > limit:
                    path.replace(_earlier(path))
                    _print_to(path)

    _print_to(path)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()  # a process that ended between the two steps of a restart would leave no file


def _earlier(output: Path) -> Path:
    return output.with_name(f"{output.name}.1")


def _print_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
