"""Where the checkpoints of a run lie: a folder, or any URL that fsspec opens.

    Folder    HOME/step-N.TAG.partial/rank-00000.bin … metadata.json  ─▶  HOME/step-N/    one rename
    Bucket    HOME/step-N/TAG.rank-00000.bin …                        ─▶  HOME/step-N/metadata.json    one object

A checkpoint is there once it has that name, or that object, its marker. Both come last, and go first. TAG belongs to
one save alone: a process that was cut off and comes back touches no file of another.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from byteloom.core.files import replace_file, sync
from byteloom.core.urls import file_system
from pretrain.checkpoint.errors import CheckpointError

MARKER = "metadata.json"
REASON = "invalid.txt"
"""Beside what was set aside: why."""
PAGE_BYTES = 4096
"""What addresses and lengths are multiples of where the page cache is passed by."""
PART_BYTES = 64 << 20
"""Files go to a URL in parts of this size."""


class Url:
    """Of a checkpoint, or of its home. It has a name and children, as a Path has."""

    def __init__(self, text: str) -> None:
        self._text = text.rstrip("/")

    @property
    def name(self) -> str:
        return self._text.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        return Url(self._text.rpartition("/")[0])

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self._text}/{name}")

    def __str__(self) -> str:
        return self._text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


Location = Path | Url


def locate(text: str | Location) -> Location:
    """The place that a text names: a URL, or a path of this machine."""
    if isinstance(text, str):
        return Url(text) if "://" in text else Path(text)
    return text


class Writable(Protocol):
    """A new file."""

    def write(self, content: memoryview, /) -> object: ...


class Home(Protocol):
    """The files of the checkpoints of one run. Paths are relative to it. Safe to use from many threads.

    Everything raises OSError; FileNotFoundError where there is no such file.
    """

    location: Location
    readers: int
    """Requests worth having under way at once."""

    def names(self) -> list[str]:
        """Of the checkpoints that are there, oldest first."""

    def has_set_aside(self) -> bool:
        """Whether a checkpoint of it was found invalid."""

    def begin(self, name: str) -> str:
        """Makes room for a new checkpoint; returns what the paths of its files begin with until it is committed.

        Raises:
            FileExistsError: it is there already.
        """

    def stored_name(self, name: str, draft: str, file: str) -> str:
        """A file's name in the checkpoint, once that is committed."""

    def create(self, path: str) -> AbstractContextManager[Writable]:
        """A new file; it is durable when the block ends, and need not be there when it raises."""

    def commit(self, name: str, draft: str, marker: bytes) -> None:
        """Makes a checkpoint of what was created; all of it is there, or nothing.

        Raises:
            OSError: it has been swept away, or another process made a checkpoint of this name.
        """

    def abandon(self, draft: str) -> None:
        """Removes what was created."""

    def size(self, path: str) -> int: ...

    def read(self, path: str) -> bytes:
        """A whole small file."""

    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        """Fills a buffer from a file; returns the bytes there were."""

    def set_aside(self, name: str, reason: str) -> str:
        """Makes an invalid checkpoint none any more; returns where a person finds it."""

    def delete(self, name: str) -> None:
        """Deletes a checkpoint, which is none any more from the first moment on."""

    def sweep(self) -> None:
        """Removes what killed or fenced-off processes were writing or deleting: they cannot commit it any more."""


def open_home(location: str | Location) -> Home:
    """The home at a path or URL.

    Raises:
        CheckpointError: nothing here opens URLs of this kind.
        MissingPackageError: the package that opens them is not installed.
    """
    place = locate(location)
    return Bucket(place) if isinstance(place, Url) else Folder(place)


def committed(home: Home) -> list[Location]:
    """Return the checkpoints of a home, oldest first. Their content is not verified.

    Raises:
        CheckpointError: the home cannot be read.
    """
    try:
        return [home.location / name for name in home.names()]
    except OSError as error:
        raise CheckpointError(f"{home.location} cannot be read: {error}") from error


def step_of(checkpoint: Location) -> int:
    """Return the step of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def _step_names(names: Iterable[str]) -> list[str]:
    return sorted((name for name in names if re.fullmatch(r"step-\d{8,}", name)), key=lambda name: int(name[5:]))


def _tag() -> str:
    return uuid.uuid4().hex[:12]


class _DirectFile:
    """A new file that is written past the page cache, as long as file system and content allow it.

    That spares a copy of every byte, and leaves the cache to what training reads.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._is_direct = self._pass_by_cache(True)

    def write(self, content: memoryview) -> None:
        if self._is_direct and (len(content) % PAGE_BYTES or _address_of(content) % PAGE_BYTES):
            whole = len(content) // PAGE_BYTES * PAGE_BYTES if _address_of(content) % PAGE_BYTES == 0 else 0
            self._write(content[:whole])
            content = content[whole:]
            self._is_direct = self._pass_by_cache(False)
        self._write(content)

    def _write(self, content: memoryview) -> None:
        while content:
            try:
                content = content[self._file.write(content) :]
            except OSError as error:
                if not self._is_direct or error.errno != errno.EINVAL:
                    raise
                self._is_direct = self._pass_by_cache(False)

    def _pass_by_cache(self, wanted: bool) -> bool:
        """Whether the cache is passed by from now on."""
        direct = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~direct
        try:
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | direct if wanted else flags)
        except OSError:  # a file system that cannot
            return False
        return wanted and bool(direct)


def _address_of(content: memoryview) -> int:
    return int(np.frombuffer(content, np.uint8).ctypes.data)


class Folder:
    """A folder of this machine, or one that it shares with others."""

    readers = max(2, min(8, os.cpu_count() or 1))

    def __init__(self, path: Path) -> None:
        self.location: Location = path
        self._path = path

    def names(self) -> list[str]:
        return _step_names(path.name for path in self._path.iterdir()) if self._path.is_dir() else []

    def has_set_aside(self) -> bool:
        return any(self._path.glob("step-*.invalid"))

    def begin(self, name: str) -> str:
        if (self._path / name).exists():
            raise FileExistsError(f"{self._path / name} exists already")
        draft = f"{name}.{_tag()}.partial"
        (self._path / draft).mkdir(parents=True)
        return f"{draft}/"

    def stored_name(self, name: str, draft: str, file: str) -> str:
        return file

    @contextmanager
    def create(self, path: str) -> Iterator[Writable]:
        with (self._path / path).open("xb", buffering=0) as file:
            yield _DirectFile(file)
            os.fsync(file.fileno())

    def commit(self, name: str, draft: str, marker: bytes) -> None:
        with self.create(draft + MARKER) as file:
            file.write(memoryview(marker))
        folder = self._path / draft
        sync(folder)
        folder.rename(self._path / name)  # fails where a folder of that name has anything in it
        sync(self._path)
        sync(self._path.parent)

    def abandon(self, draft: str) -> None:
        shutil.rmtree(self._path / draft, ignore_errors=True)

    def size(self, path: str) -> int:
        return (self._path / path).stat().st_size

    def read(self, path: str) -> bytes:
        return (self._path / path).read_bytes()

    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        with (self._path / path).open("rb", buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(target) and (count := file.readinto(target[done:])):
                done += count
            return done

    def set_aside(self, name: str, reason: str) -> str:
        aside = self._path / f"{name}.invalid"
        if aside.exists():
            shutil.rmtree(aside)
        (self._path / name).rename(aside)
        with contextlib.suppress(OSError):  # a full disk; the log has it too
            (aside / REASON).write_text(f"{reason}\n", encoding="utf-8")
        return aside.name

    def delete(self, name: str) -> None:
        self._remove(self._path / name)

    def sweep(self) -> None:
        for left in [*self._path.glob("step-*.partial"), *self._path.glob("step-*.deleting")]:
            self._remove(left)

    def _remove(self, folder: Path) -> None:
        """Takes away its name first: then no other process can rename it, or take half of it for the whole."""
        doomed = folder.with_name(f"{folder.name.removesuffix('.deleting')}.deleting")
        folder.rename(doomed)
        shutil.rmtree(doomed)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Backends have kinds of errors of their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        said = str(error).partition("\n")[0]
        raise OSError(f"{type(error).__name__}: {said}") from error


class Bucket:
    """Objects below a URL. The marker is made only where there is none: with S3, by a conditional request."""

    readers = 8

    def __init__(self, url: Url) -> None:
        self.location: Location = url
        self._files, self._root = _file_system(url)

    @_os_errors()
    def names(self) -> list[str]:
        return _step_names(step for step in self._steps() if self._has(step, MARKER))

    @_os_errors()
    def has_set_aside(self) -> bool:
        return any(self._has(step, REASON) for step in self._steps())

    def _steps(self) -> list[str]:
        """Names of what is or was a checkpoint, or was to be one."""
        try:
            found = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return _step_names(path.rstrip("/").rpartition("/")[2] for path in found)

    def _has(self, name: str, file: str) -> bool:
        return bool(self._files.exists(f"{self._root}/{name}/{file}"))

    @_os_errors()
    def begin(self, name: str) -> str:
        if self._has(name, MARKER):
            raise FileExistsError(f"{self.location / name} exists already")
        return f"{name}/{_tag()}."

    def stored_name(self, name: str, draft: str, file: str) -> str:
        return (draft + file).removeprefix(f"{name}/")

    @contextmanager
    def create(self, path: str) -> Iterator[Writable]:
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
        path = f"{self._root}/{name}/{MARKER}"
        try:
            self._files.pipe_file(path, marker, mode="create")
        except Exception:
            if self._files.exists(path) and self._files.cat_file(path) == marker:
                return  # only the answer was lost on the way
            raise

    @_os_errors()
    def abandon(self, draft: str) -> None:
        folder, _, tag = f"{self._root}/{draft}".rpartition("/")
        files = {path.rpartition("/")[2]: path for path in self._files.ls(folder, detail=False)}
        if MARKER in files:  # of this draft, maybe: its commit failed in a way that does not say
            return
        for name, path in files.items():
            if name.startswith(tag):
                self._files.rm_file(path)

    @_os_errors()
    def size(self, path: str) -> int:
        return int(self._files.size(f"{self._root}/{path}"))

    @_os_errors()
    def read(self, path: str) -> bytes:
        content: bytes = self._files.cat_file(f"{self._root}/{path}")
        return content

    @_os_errors()
    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        content = self._files.cat_file(f"{self._root}/{path}", start=offset, end=offset + len(target))
        target[: len(content)] = content
        return len(content)

    @_os_errors()
    def replace(self, path: str, content: bytes) -> None:
        """Writes a small file, so that readers find either what was or what is now."""
        self._files.pipe_file(f"{self._root}/{path}", content)

    @_os_errors()
    def set_aside(self, name: str, reason: str) -> str:
        folder = f"{self._root}/{name}"
        self._files.pipe_file(f"{folder}/{REASON}", f"{reason}\n".encode())
        self._files.copy(f"{folder}/{MARKER}", f"{folder}/{MARKER}.invalid")
        self._files.rm_file(f"{folder}/{MARKER}")
        return f"{name}/{REASON}"

    @_os_errors()
    def delete(self, name: str) -> None:
        self._files.rm_file(f"{self._root}/{name}/{MARKER}")
        self._files.rm(f"{self._root}/{name}", recursive=True)

    @_os_errors()
    def sweep(self) -> None:
        for name in self._steps():
            if not self._has(name, MARKER) and not self._has(name, REASON):
                self._files.rm(f"{self._root}/{name}", recursive=True)


def _file_system(url: Url) -> tuple[Any, str]:
    """The file system of a URL and the path in it, without caches.

    Raises:
        CheckpointError: nothing here opens URLs of this kind.
        MissingPackageError: the package that opens them is not installed.
    """
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if str(url).startswith("s3"):
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}  # s3fs has attempts of its own
    try:
        files, root = file_system(str(url), **options)
    except ValueError as error:
        raise CheckpointError(f"{url} cannot be opened: {error}") from error
    return files, root.rstrip("/")


class Note:
    """A small text at a place. Both ways raise OSError; bytes that are no UTF-8 are read as U+FFFD."""

    def __init__(self, place: Location) -> None:
        self.place = place
        self._bucket = Bucket(place.parent) if isinstance(place, Url) else None

    def read(self) -> str | None:
        """None where there is none."""
        try:
            if isinstance(self.place, Path):
                return self.place.read_text(encoding="utf-8", errors="replace")
            assert self._bucket is not None
            return self._bucket.read(self.place.name).decode(errors="replace")
        except FileNotFoundError:
            return None

    def replace(self, text: str) -> None:
        """Readers find either what was or what is now."""
        if isinstance(self.place, Path):
            self.place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.place, text)
        else:
            assert self._bucket is not None
            self._bucket.replace(self.place.name, text.encode())
