"""Files that the process keeps open for reading, under one budget.

A mixture reads many corpora of many shards. Each keeps its shards open, but the process as a whole stays within its
limit of open files: the least recently used file is closed.
"""

import contextlib
import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

SHARE = 2
"""The budget is the process's limit of open files divided by this; sockets, libraries and logs need the rest."""


def raise_open_file_limit() -> None:
    """Raise the process's limit of open files to the highest that it may set."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a hard limit above what the kernel allows
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class OpenFile:
    """A file that is open for reading. It is closed when nothing refers to it, so no thread loses it while it reads."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close the file, also at the end of the process, where this module's names may be gone."""
        if hasattr(self, "number"):
            close(self.number)


class OpenFiles:
    """Open files, the least recently used first. Many threads may use it.

    Each owner has files of its own: a path may name another file when the next owner opens it.
    """

    def __init__(self) -> None:
        self._files = OrderedDict[tuple[object, Path], OpenFile]()
        self._lock = threading.Lock()

    def open(self, owner: object, path: Path) -> OpenFile:
        """Return an owner's file, open for reading.

        Raises:
            OSError: it cannot be opened.
        """
        key = (owner, path)
        with self._lock:
            if key not in self._files:
                self._files[key] = self._opened(path)
                while len(self._files) > budget():
                    self._files.popitem(last=False)
            self._files.move_to_end(key)
            return self._files[key]

    def _opened(self, path: Path) -> OpenFile:
        try:
            return OpenFile(path)
        except OSError as error:
            if error.errno != errno.EMFILE or not self._files:
                raise
            self._files.clear()  # other parts of the process use more files than their share
            return OpenFile(path)

    def close(self, owner: object, path: Path) -> None:
        """Close a file, if it is open; the next reader opens it again."""
        with self._lock:
            self._files.pop((owner, path), None)

    def close_all(self, owner: object) -> None:
        """Close the files of an owner."""
        with self._lock:
            for key in [key for key in self._files if key[0] is owner]:
                del self._files[key]


def budget() -> int:
    """Return how many files may stay open."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // SHARE)


OPEN_FILES = OpenFiles()
"""The open files of this process."""
# A worker of PyTorch's DataLoader is a fork. It must not inherit a lock that a thread of its parent held.
os.register_at_fork(
    before=OPEN_FILES._lock.acquire,
    after_in_parent=OPEN_FILES._lock.release,
    after_in_child=OPEN_FILES._lock.release,
)
