"""Storage in a folder of this machine."""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from byteloom.core.locks import LockHeldError, lock_folder
from data_pipeline.errors import CorpusError, CorruptBlockError, MissingFileError, ShardEndsError

OPEN_FILES = 128
"""Largest number of files of a folder that stay open."""


class Folder:
    """Files of a corpus in a folder of this machine."""

    rereads = 1

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self.local_folder: Path | None = path
        self._descriptors = OrderedDict[str, _Descriptor]()
        self._lock = threading.Lock()

    def check_presence(self) -> None:
        """Raise a CorpusError if there is no folder, or no manifest in it."""
        if not self.path.is_dir():
            raise CorpusError(f"there is no corpus at {self.path}: no such folder (byteloom prepare makes one)")
        if not (self.path / "manifest.json").exists():
            raise CorpusError(f"{self.path} is not a corpus: it has no manifest.json (byteloom prepare writes it)")

    def check_size(self, name: str, size: int) -> None:
        """Raise a CorpusError if a file is missing or has another size."""
        try:
            found = (self.path / name).stat().st_size
        except OSError as error:
            raise CorpusError(f"{self.path / name} cannot be read: {error.strerror}") from error
        if found != size:
            raise CorpusError(f"{self.path / name} has {found:,} bytes, but was written with {size:,}")

    def shard_files(self) -> list[Path]:
        """Return the files that are named like a shard or a part of one, sorted."""
        return sorted(self.path.glob("shard-*.tar*"))

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return a range of a file. See `Storage.read`."""
        try:
            span = os.pread(self._descriptor(name).number, end - begin, begin)
        except OSError as error:
            kind = CorruptBlockError if error.errno == errno.EIO else CorpusError
            raise kind(f"{self.path / name} cannot be read: {error.strerror}") from error
        if len(span) != end - begin:
            raise ShardEndsError(f"{self.path / name} ends before byte {end:,}")
        return span

    def read_ahead(self, name: str, begin: int, end: int, span_end: int, fresh: bool) -> bytes:
        """Return a range of a file; the kernel reads ahead by itself. See `Storage.read_ahead`."""
        return self.read(name, begin, end)

    def read_small(self, name: str) -> bytes:
        """Return a whole file. See `Storage.read_small`."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise MissingFileError(f"{self.path / name} cannot be read: there is no such file") from error
        except OSError as error:
            raise CorpusError(f"{self.path / name} cannot be read: {error.strerror}") from error

    def local_copy(self, name: str, size: int, digest: str, fresh: bool) -> Path:
        """Return the path of a file. See `Storage.local_copy`."""
        return self.path / name

    def identify(self, digest: str) -> None:
        """Do nothing: a folder has no cache."""

    def _descriptor(self, name: str) -> "_Descriptor":
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = _Descriptor(self.path / name)
                if len(self._descriptors) > OPEN_FILES:
                    self._descriptors.popitem(last=False)
            self._descriptors.move_to_end(name)
            return self._descriptors[name]

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            self._descriptors.clear()


class _Descriptor:
    """An open file. It is closed when nothing refers to it, so no thread loses it while it reads."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


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
