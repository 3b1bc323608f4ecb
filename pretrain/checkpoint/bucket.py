"""Home of checkpoints below a URL, through fsspec. home.py describes a home."""

import contextlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from byteloom.core.locations import Location, Url
from byteloom.core.step_folders import INVALID, MARKER, REASON, step_names
from byteloom.core.urls import file_system
from pretrain.checkpoint.errors import CheckpointError

PART_BYTES = 64 << 20
"""Size of the parts in which files are uploaded."""
S3_ATTEMPTS = 5
"""Times that a request to S3 is made, with pauses."""


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raise OSError in place of a backend's own kinds of errors."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"{type(error).__name__}: {reason}") from error


class BucketHome:
    """Checkpoints as objects below a URL. A commit creates the marker, by a conditional request with S3.

    Raises:
        CheckpointError: fsspec knows no URLs of this kind.
        MissingPackageError: the package for URLs of this kind is not installed.
    """

    readers = 8

    def __init__(self, url: Url) -> None:
        self.location: Location = url
        try:
            self._files, root = file_system(str(url), attempts=S3_ATTEMPTS)
        except ValueError as error:
            raise CheckpointError(f"{url} cannot be opened: {error}") from error
        self._root = root.rstrip("/")

    @_os_errors()
    def names(self) -> list[str]:
        """Return the names of the folders that hold a marker."""
        return step_names(step for step in self._steps() if self._has(step, MARKER))

    @_os_errors()
    def has_set_aside(self) -> bool:
        """Return whether a folder holds the reason why it is invalid."""
        return any(self._has(step, REASON) for step in self._steps())

    def _steps(self) -> list[str]:
        """Return the names of checkpoints, of drafts, and of what was a checkpoint."""
        try:
            found = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return step_names(path.rstrip("/").rpartition("/")[2] for path in found)

    def _has(self, name: str, file: str) -> bool:
        return bool(self._files.exists(f"{self._root}/{name}/{file}"))

    @_os_errors()
    def begin(self, name: str) -> str:
        """Return the prefix of a draft's objects; nothing is created."""
        if self._has(name, MARKER):
            raise FileExistsError(f"{self.location / name} exists already")
        return f"{name}/{uuid.uuid4().hex[:12]}."

    def stored_name(self, name: str, draft: str, file: str) -> str:
        """Return the file's name with the tag of its save: an object keeps its name."""
        return (draft + file).removeprefix(f"{name}/")

    @contextmanager
    def create(self, path: str) -> Iterator[Any]:
        """Open a new object, which exists once the block has ended."""
        with _os_errors():
            file = self._files.open(f"{self._root}/{path}", "wb", block_size=PART_BYTES, autocommit=False)
            try:
                yield file
                file.close()
                file.commit()
            except BaseException:
                with contextlib.suppress(Exception):
                    file.closed = True
                    file.discard()
                raise

    @_os_errors()
    def commit(self, name: str, draft: str, marker: bytes) -> None:
        """Create the marker if there is none."""
        path = f"{self._root}/{name}/{MARKER}"
        try:
            self._files.pipe_file(path, marker, mode="create")
        except Exception:
            if self._files.exists(path) and self._files.cat_file(path) == marker:
                return  # the request succeeded, and its answer was lost
            raise

    @_os_errors()
    def abandon(self, draft: str) -> None:
        """Remove the objects of a draft, unless the checkpoint has a marker."""
        folder, _, tag = f"{self._root}/{draft}".rpartition("/")
        files = {path.rpartition("/")[2]: path for path in self._files.ls(folder, detail=False)}
        if MARKER in files:  # maybe of this draft: a commit can fail without saying whether it was made
            return
        for name, path in files.items():
            if name.startswith(tag):
                self._files.rm_file(path)

    @_os_errors()
    def size(self, path: str) -> int:
        """Return the length of an object in bytes."""
        return int(self._files.size(f"{self._root}/{path}"))

    @_os_errors()
    def read(self, path: str) -> bytes:
        """Return the content of an object."""
        content: bytes = self._files.cat_file(f"{self._root}/{path}")
        return content

    @_os_errors()
    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        """Fill a buffer from an object, starting at an offset; return the number of bytes read."""
        content = self._files.cat_file(f"{self._root}/{path}", start=offset, end=offset + len(target))
        target[: len(content)] = content
        return len(content)

    @_os_errors()
    def replace(self, path: str, content: bytes) -> None:
        """Write a small object; readers find the old content or the new one."""
        self._files.pipe_file(f"{self._root}/{path}", content)

    @_os_errors()
    def set_aside(self, name: str, reason: str) -> str:
        """Write the reason, and rename the marker of an invalid checkpoint."""
        folder = f"{self._root}/{name}"
        self._files.pipe_file(f"{folder}/{REASON}", f"{reason}\n".encode())
        self._files.copy(f"{folder}/{MARKER}", f"{folder}/{MARKER}{INVALID}")
        self._files.rm_file(f"{folder}/{MARKER}")
        return f"{name}/{REASON}"

    @_os_errors()
    def delete(self, name: str) -> None:
        """Delete the marker, then the other objects."""
        self._files.rm_file(f"{self._root}/{name}/{MARKER}")
        self._files.rm(f"{self._root}/{name}", recursive=True)

    @_os_errors()
    def sweep(self) -> None:
        """Remove the folders that have neither a marker nor a reason."""
        for name in self._steps():
            if not self._has(name, MARKER) and not self._has(name, REASON):
                self._files.rm(f"{self._root}/{name}", recursive=True)
