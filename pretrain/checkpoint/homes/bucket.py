"""Home of checkpoints below a URL, through fsspec. home.py describes a home."""

import contextlib
import itertools
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from byteloom.core.faults import in_words
from byteloom.core.retries import RequestError, RetryPolicy
from byteloom.core.storage.locations import Location, Url
from byteloom.core.storage.remote_files import RemoteFiles
from byteloom.core.storage.step_folders import INVALID, MARKER, POST_MORTEM, REASON, step_names
from pretrain.checkpoint.errors import CheckpointError

PART_BYTES = 64 << 20
"""Size of the parts in which files are uploaded."""
BUCKET_POLICY = RetryPolicy(attempts=10, backoff_seconds=0.5, deadline_seconds=120.0)
"""Limits of the attempts at a bucket. The client of S3 repeats the parts of an upload."""
S3_ATTEMPTS = 5
"""Times that the client of S3 makes a request within one attempt."""
TIMEOUT_SECONDS = 60.0
"""Time for a connection, and for the first bytes of an answer."""


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
            self._files = RemoteFiles(str(url), BUCKET_POLICY, TIMEOUT_SECONDS, S3_ATTEMPTS)
        except ValueError as error:
            raise CheckpointError(f"{url} cannot be opened: {error}") from error

    def _ask(self, method: str, path: str = "", *arguments: Any, size: int = 0, **options: Any) -> Any:
        """Return the answer of the file system, after as many attempts as the policy allows.

        Raises:
            OSError: in place of a backend's own kinds of errors.
        """
        try:
            return self._files.retried(
                path, lambda: self._files.request(method, path, *arguments, size=size, **options)
            )
        except RequestError as error:
            cause = error.__cause__
            if isinstance(cause, OSError):
                raise cause from cause.__cause__
            raise OSError(str(error)) from cause

    def names(self) -> list[str]:
        """Return the names of the folders that hold a marker."""
        return step_names(step for step in self._steps() if self._has(step, MARKER))

    def has_set_aside(self) -> bool:
        """Return whether a folder holds the reason why it is invalid."""
        return any(self._has(step, REASON) for step in self._steps())

    def _steps(self, suffix: str = "") -> list[str]:
        """Return the names of checkpoints, of drafts, and of what was a checkpoint, with a suffix."""
        try:
            found = self._ask("ls", detail=False)
        except FileNotFoundError:
            return []
        names = (path.rstrip("/").rpartition("/")[2] for path in found)
        return [name + suffix for name in step_names(n.removesuffix(suffix) for n in names if n.endswith(suffix))]

    def _has(self, name: str, file: str) -> bool:
        return bool(self._ask("exists", f"{name}/{file}"))

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
        files = self._files.files
        with _os_errors():
            try:
                file = files.open(self._files.path(path), "wb", block_size=PART_BYTES, autocommit=False)
                try:
                    yield file
                    file.close()
                    file.commit()
                except BaseException:
                    with contextlib.suppress(Exception):
                        file.closed = True
                        file.discard()
                    raise
            except Exception as error:
                self._files.note_failure(files, error)
                raise

    def commit(self, name: str, draft: str, marker: bytes) -> None:
        """Create the marker if there is none."""
        self.create_once(f"{name}/{MARKER}", marker)

    def create_once(self, path: str, content: bytes) -> None:
        """Create a small object; raise OSError if there is one with another content."""
        try:
            self._ask("pipe_file", path, content, mode="create")
        except OSError:
            if self._ask("exists", path) and self.read(path) == content:
                return  # the request succeeded, and its answer was lost
            raise

    def abandon(self, draft: str) -> None:
        """Remove the objects of a draft, unless the checkpoint has a marker."""
        folder, _, tag = draft.rpartition("/")
        names = [path.rpartition("/")[2] for path in self._ask("ls", folder, detail=False)]
        if MARKER in names:  # maybe of this draft: a commit can fail without saying whether it was made
            return
        for name in names:
            if name.startswith(tag):
                self._ask("rm_file", f"{folder}/{name}")

    def is_link(self, path: str) -> bool:
        """Return False: there are no links among objects."""
        return False

    def size(self, path: str) -> int:
        """Return the length of an object in bytes."""
        return int(self._ask("size", path))

    def read(self, path: str) -> bytes:
        """Return the content of an object."""
        content: bytes = self._ask("cat_file", path, size=PART_BYTES)
        return content

    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        """Fill a buffer from an object, starting at an offset; return the number of bytes read."""
        content = self._ask("cat_file", path, size=len(target), start=offset, end=offset + len(target))
        target[: len(content)] = content
        return len(content)

    def replace(self, path: str, content: bytes) -> None:
        """Write a small object; readers find the old content or the new one."""
        self._ask("pipe_file", path, content, size=len(content))

    def set_aside(self, name: str, reason: str) -> str:
        """Add the reason to those of earlier times, and rename the marker of an invalid checkpoint."""
        earlier = self.read(f"{name}/{REASON}") if self._has(name, REASON) else b""
        self.replace(f"{name}/{REASON}", earlier + f"{reason}\n".encode())
        numbers = itertools.count(2)
        aside = f"{MARKER}{INVALID}"
        while self._has(name, aside):
            aside = f"{MARKER}.{next(numbers)}{INVALID}"
        self._ask("cp_file", f"{name}/{MARKER}", self._files.path(f"{name}/{aside}"))
        self._ask("rm_file", f"{name}/{MARKER}")
        return f"{name}/{REASON}"

    def delete(self, name: str) -> None:
        """Delete the marker, then the other objects; those of an earlier quarantined checkpoint of this step stay."""
        marker = self.read(f"{name}/{MARKER}")
        self._ask("rm_file", f"{name}/{MARKER}")
        if not self._has(name, REASON):
            self._ask("rm", name, recursive=True)
            return
        for path in self._ask("ls", name, detail=False):
            stored = path.rpartition("/")[2]
            tag, _, file = stored.partition(".")
            if file.endswith((".bin", ".json")) and f'"{tag}.'.encode() in marker:
                self._ask("rm_file", f"{name}/{stored}")

    def sweep(self) -> None:
        """Remove the folders that have neither a marker nor a reason."""
        for name in (*self._steps(), *self._steps(POST_MORTEM)):
            if not self._has(name, MARKER) and not self._has(name, REASON):
                self._ask("rm", name, recursive=True)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raise OSError in place of a backend's own kinds of errors."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(in_words(error)) from error
