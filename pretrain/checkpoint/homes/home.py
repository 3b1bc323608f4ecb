"""Home of a run's checkpoints: a folder, or any URL that fsspec opens.

    FolderHome    HOME/step-N.TAG.partial/rank-00000.bin … metadata.json  ─▶  HOME/step-N/    one rename
    BucketHome    HOME/step-N/TAG.rank-00000.bin …                        ─▶  HOME/step-N/metadata.json    one object

A checkpoint exists once it has this name, or this object, its marker. Both are written last and deleted first. TAG
belongs to one save alone: a process that was cut off and returns touches no file of another save.
"""

from contextlib import AbstractContextManager
from typing import Protocol

from byteloom.core.storage.locations import Location, Url, locate
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.homes.bucket import BucketHome
from pretrain.checkpoint.homes.folder import FolderHome


class Writable(Protocol):
    """A new file."""

    def write(self, content: memoryview, /) -> object:
        """Append bytes."""


class Home(Protocol):
    """The files of the checkpoints of one run. Paths are relative to it. Safe to use from many threads.

    Every method raises OSError when the file system fails, and FileNotFoundError when there is no such file.
    """

    location: Location
    readers: int
    """Number of concurrent requests that reads are fastest with."""

    def names(self) -> list[str]:
        """Return the names of the committed checkpoints, oldest first."""

    def has_set_aside(self) -> bool:
        """Return whether a checkpoint of this home was found invalid."""

    def begin(self, name: str) -> str:
        """Prepare a new checkpoint; return the prefix of its files' paths until it is committed.

        Raises:
            FileExistsError: it exists already.
        """

    def stored_name(self, name: str, draft: str, file: str) -> str:
        """Return the name that a file has in the committed checkpoint."""

    def create(self, path: str) -> AbstractContextManager[Writable]:
        """Open a new file. It is durable when the block ends; it may be absent when the block raises."""

    def commit(self, name: str, draft: str, marker: bytes) -> None:
        """Make the created files a checkpoint, all of them or none.

        Raises:
            OSError: the files were swept away, or another process committed a checkpoint of this name.
        """

    def abandon(self, draft: str) -> None:
        """Remove the created files."""

    def is_link(self, path: str) -> bool:
        """Return whether a file or folder is a symbolic link, which is not followed."""

    def size(self, path: str) -> int:
        """Return the length of a file in bytes."""

    def read(self, path: str) -> bytes:
        """Return the content of a small file."""

    def read_into(self, path: str, offset: int, target: memoryview) -> int:
        """Fill a buffer from a file, starting at an offset; return the number of bytes read."""

    def set_aside(self, name: str, reason: str) -> str:
        """Quarantine an invalid checkpoint, and return its new place."""

    def delete(self, name: str) -> None:
        """Delete a checkpoint. It stops being one before its first file is deleted."""

    def sweep(self) -> None:
        """Remove what killed or fenced-off processes were writing or deleting, so that they cannot commit it."""


def open_home(location: str | Location) -> Home:
    """Return the home at a path or URL.

    Raises:
        CheckpointError: fsspec knows no URLs of this kind.
        MissingPackageError: the package for URLs of this kind is not installed.
    """
    place = locate(location)
    return BucketHome(place) if isinstance(place, Url) else FolderHome(place)


def committed(home: Home) -> list[Location]:
    """Return the checkpoints of a home, oldest first. Their content is not verified.

    Raises:
        CheckpointError: the home cannot be read.
    """
    try:
        return [home.location / name for name in home.names()]
    except OSError as error:
        raise CheckpointError(f"{home.location} cannot be read: {error}") from error
