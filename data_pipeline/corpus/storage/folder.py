"""Storage in a folder of this machine, which may be on a network file system.

A handle that a file server has forgotten (ESTALE) is opened again. Other faults of a network pass in the same way.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from byteloom.core.faults import FaultClass
from byteloom.core.retries import RequestError, RequestStoppedError, RetryPolicy, retry
from byteloom.core.storage.locks import LockHeldError, lock_folder
from byteloom.core.storage.open_files import OPEN_FILES
from data_pipeline.errors import CorpusError, CorruptBlockError, DamagedCorpusError, MissingFileError, ShardEndsError

FOLDER_POLICY = RetryPolicy(attempts=20, backoff_seconds=0.1, deadline_seconds=120.0)
"""Limits of the attempts at a folder on a network file system."""

T = TypeVar("T")


class Folder:
    """Files of a corpus in a folder of this machine."""

    rereads = 1

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self.local_folder: Path | None = path
        self._owner = object()
        self._paths = dict[str, Path]()
        self._closed = threading.Event()

    def check_presence(self) -> None:
        """Raise a CorpusError if there is no folder, or no manifest in it."""
        if not self.path.is_dir():
            raise DamagedCorpusError(f"there is no corpus at {self.path}: no such folder (byteloom prepare makes one)")
        if not (self.path / "manifest.json").exists():
            raise DamagedCorpusError(
                f"{self.path} is not a corpus: it has no manifest.json (byteloom prepare writes it)"
            )

    def check_size(self, name: str, size: int) -> None:
        """Raise a CorpusError if a file is missing or has another size."""
        try:
            found = (self.path / name).stat().st_size
        except OSError as error:
            raise DamagedCorpusError(f"{self.path / name} cannot be read: {error.strerror}") from error
        if found != size:
            raise DamagedCorpusError(f"{self.path / name} has {found:,} bytes, but was written with {size:,}")

    def shard_files(self) -> list[Path]:
        """Return the files that are named like a shard or a part of one, sorted."""
        return sorted(self.path.glob("shard-*.tar*"))

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return a range of a file. See `Storage.read`."""
        path = self._paths.get(name) or self._paths.setdefault(name, self.path / name)
        span = self._retried(path, lambda: os.pread(OPEN_FILES.open(self._owner, path).number, end - begin, begin))
        if len(span) != end - begin:
            raise ShardEndsError(f"{self.path / name} ends before byte {end:,}")
        return span

    def read_ahead(self, name: str, begin: int, end: int, span_end: int, fresh: bool) -> bytes:
        """Return a range of a file; the kernel reads ahead by itself. See `Storage.read_ahead`."""
        return self.read(name, begin, end)

    def read_small(self, name: str) -> bytes:
        """Return a whole file. See `Storage.read_small`."""
        path = self.path / name
        return self._retried(path, path.read_bytes)

    def read_index(self, name: str, size: int, digest: str, fresh: bool) -> bytes:
        """Return an index file. See `Storage.read_index`."""
        return self.read_small(name)

    def _retried(self, path: Path, read: Callable[[], T]) -> T:
        """Return what a function reads from a file, or raise the error of a corpus that its fault means."""
        try:
            return retry(
                read,
                FOLDER_POLICY,
                str(path),
                stopped=self._closed,
                before_retry=lambda error: OPEN_FILES.close(self._owner, path),
            )
        except RequestStoppedError as error:
            raise CorpusError(f"{path} cannot be read: the corpus is closed") from error
        except RequestError as error:
            if error.is_missing:
                raise MissingFileError(f"{path} cannot be read: there is no such file") from error
            cause = error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
            kind = CorruptBlockError if error.fault is FaultClass.DAMAGED else CorpusError
            raise kind(f"{path} cannot be read: {reason}") from error

    def identify(self, digest: str) -> None:
        """Do nothing: a folder has no cache."""

    def close(self) -> None:
        """Close all files."""
        self._closed.set()
        OPEN_FILES.close_all(self._owner)


@contextmanager
def only_writer(folder: Path, wait: bool) -> Iterator[None]:
    """Keep other processes from changing a corpus during the block. The lock ends with the process.

    Args:
        folder: folder of the corpus.
        wait: whether to wait until another process has finished.

    Raises:
        CorpusError: there is no such folder; or another process is changing it, and `wait` is false.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(folder, wait=wait))
        except LockHeldError as error:
            raise CorpusError(f"another process is changing {folder}") from error
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorpusError(f"there is no corpus at {folder}: {error.strerror}") from error
        except OSError as error:
            raise CorpusError(f"{folder} cannot be locked: {error.strerror}") from error
        yield
