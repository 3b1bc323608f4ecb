"""Home of checkpoints in a folder of this machine, or in one that it shares with others. home.py describes a home."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import numpy as np

from byteloom.core.storage.files import sync
from byteloom.core.storage.locations import Location
from byteloom.core.storage.step_folders import DELETING, INVALID, MARKER, PARTIAL, REASON, step_names

PAGE_BYTES = 4096
"""Alignment of addresses and lengths that O_DIRECT requires."""


class FolderHome:
    """Checkpoints in a folder. A commit is one rename."""

    readers = max(2, min(8, os.cpu_count() or 1))

    def __init__(self, path: Path) -> None:
        self.location: Location = path
        self._path = path

    def names(self) -> list[str]:
        """Return the names of the folders without a suffix."""
        return step_names(path.name for path in self._path.iterdir()) if self._path.is_dir() else []

    def has_set_aside(self) -> bool:
        """Return whether there is a folder of an invalid checkpoint."""
        return any(self._path.glob(f"step-*{INVALID}"))

    def begin(self, name: str) -> str:
        """Create the folder of a draft; return its name with a slash."""
        if (self._path / name).exists():
            raise FileExistsError(f"{self._path / name} exists already")
        draft = f"{name}.{uuid.uuid4().hex[:12]}{PARTIAL}"
        self._path.mkdir(exist_ok=True)  # its parent is there, or the run's folder was removed
        (self._path / draft).mkdir()
        return f"{draft}/"

    def stored_name(self, name: str, draft: str, file: str) -> str:
        """Return the file's name as it is: the rename of the folder keeps it."""
        return file

    @contextmanager
    def create(self, path: str) -> Iterator["DirectFile"]:
        """Open a new file, and sync it at the end of the block."""
        with (self._path / path).open("xb", buffering=0) as file:
            yield DirectFile(file)
            os.fsync(file.fileno())

    def commit(self, name: str, draft: str, marker: bytes) -> None:
        """Write the marker and rename the draft."""
        with self.create(draft + MARKER) as file:
            file.write(memoryview(marker))
        folder = self._path / draft
        sync(folder)
        folder.rename(self._path / name)  # fails if a folder of that name has anything in it
        sync(self._path)
        sync(self._path.parent)

    def abandon(self, draft: str) -> None:
        """Remove the folder of a draft."""
        shutil.rmtree(self._path / draft, ignore_errors=True)

    def is_link(self, path: str) -> bool:
        """Return whether a file or folder is a symbolic link."""
        return (self._path / path).is_symlink()

    def size(self, path: str) -> int:
        """Return the length of a file in bytes."""
        return (self._path / path).stat().st_size

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        return (self._path / path).read_bytes()

    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        """Fill a buffer from a file, starting at an offset; return the number of bytes read."""
        with (self._path / path).open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(target) and (count := file.readinto(target[done:])):
                done += count
            return done

    def set_aside(self, name: str, reason: str) -> str:
        """Rename an invalid checkpoint, and write the reason into it, or next to it if it is a link."""
        numbers = itertools.count(2)
        aside = self._path / f"{name}{INVALID}"
        while os.path.lexists(aside):
            aside = self._path / f"{name}.{next(numbers)}{INVALID}"
        (self._path / name).rename(aside)
        note = aside.with_name(f"{aside.name}.txt") if aside.is_symlink() else aside / REASON
        with contextlib.suppress(OSError):  # a full disk; the log has the reason too
            note.write_text(f"{reason}\n", encoding="utf-8")
        return aside.name

    def delete(self, name: str) -> None:
        """Delete a checkpoint."""
        self._remove(self._path / name)

    def sweep(self) -> None:
        """Remove the drafts, and the folders whose deletion was interrupted."""
        for leftover in [*self._path.glob(f"step-*{PARTIAL}"), *self._path.glob(f"step-*{DELETING}")]:
            self._remove(leftover)

    def _remove(self, folder: Path) -> None:
        """Rename a folder, then delete it: no other process can commit it, or take a half of it for a checkpoint."""
        doomed = folder.with_name(f"{folder.name.removesuffix(DELETING)}{DELETING}")
        folder.rename(doomed)
        if doomed.is_symlink():
            doomed.unlink()
        else:
            shutil.rmtree(doomed)


class DirectFile:
    """A new file that is written with O_DIRECT, as far as the file system and the alignment of the content allow.

    This spares a copy of every byte, and leaves the page cache to what training reads.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._is_direct = self._set_direct(True)

    def write(self, content: memoryview) -> None:
        """Append bytes. An address or a length that is not aligned turns O_DIRECT off for the rest of the file."""
        if self._is_direct and (len(content) % PAGE_BYTES or _address_of(content) % PAGE_BYTES):
            whole = len(content) // PAGE_BYTES * PAGE_BYTES if _address_of(content) % PAGE_BYTES == 0 else 0
            self._write(content[:whole])
            content = content[whole:]
            self._is_direct = self._set_direct(False)
        self._write(content)

    def _write(self, content: memoryview) -> None:
        while content:
            try:
                content = content[self._file.write(content) :]
            except OSError as error:
                if not self._is_direct or error.errno != errno.EINVAL:
                    raise
                self._is_direct = self._set_direct(False)

    def _set_direct(self, wanted: bool) -> bool:
        """Turn O_DIRECT on or off; return whether it is on."""
        direct = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~direct
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | direct if wanted else flags)
        except OSError:  # the file system does not support it
            return False
        return wanted and bool(direct)


def _address_of(content: memoryview) -> int:
    return int(np.frombuffer(content, np.uint8).ctypes.data)
