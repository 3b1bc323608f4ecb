"""Opening of source files: on this machine, at a URL, or from a program.

    open_file(url) ─▶ a stream whose errors name the file

fsspec opens URLs. Its own configuration and the usual environment variables (AWS_ENDPOINT_URL, FSSPEC_S3_ANON, …)
apply. Only a source that the user wrote as `pipe:COMMAND` runs a program; see `data_pipeline.readers.webdataset`.
"""

import io
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from byteloom.core.packages import MissingPackageError
from byteloom.core.urls import file_system, is_url, is_web
from data_pipeline.sources.source_file import LeftOutError, SourceFile

STREAM_BYTES = 64 << 10
"""Size of the reads that small reads are made of. Most files are not much larger."""
READ_AHEAD_BYTES = 8 << 20
"""Size of one request to an object store."""
CONNECT_SECONDS = 60.0
"""Longest time to connect to a web server."""
READ_SECONDS = 300.0
"""Longest time to wait for the next bytes of a web server."""


def source_file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a source's URL, and the path in it. See `byteloom.core.urls.file_system`."""
    if is_web(url):
        return file_system(url, connect_seconds=CONNECT_SECONDS, read_seconds=READ_SECONDS)
    return file_system(url)


def read_small(file: SourceFile) -> bytes | None:
    """Return the content of a small file of this machine, in three system calls.

    The result is None if the file is at a URL, cannot be read, or has another size than it was listed with. `open_file`
    then says what is wrong.
    """
    if file.size is None or is_url(file.url):
        return None
    try:
        descriptor = os.open(file.url, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = os.read(descriptor, file.size + 1)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    return content if len(content) == file.size else None


def open_file(url: str, buffered: bool = True) -> BinaryIO:
    """Open a file for reading at its start. A web page is streamed; an object store is read by range.

    Args:
        url: a path or a URL.
        buffered: make small reads cheap. Without it, a file of this machine is opened faster.

    Raises:
        BadDocumentError: the file cannot be opened. Reading it raises the same error.
    """
    try:
        if not is_url(url) and not buffered:
            return cast(BinaryIO, _PlainFile(url))
        if not is_url(url):
            return io.BufferedReader(_Stream(Path(url).open("rb", buffering=0), url, seekable=True), STREAM_BYTES)
        filesystem, path = source_file_system(url)
        # Some web servers ignore range requests; without a block size fsspec makes one request and streams the answer.
        ahead = {"block_size": 0} if is_web(url) else {"block_size": READ_AHEAD_BYTES, "cache_type": "readahead"}
        return io.BufferedReader(_Stream(filesystem.open(path, "rb", **ahead), url, not is_web(url)), STREAM_BYTES)
    except MissingPackageError:
        raise
    except Exception as error:  # each of fsspec's libraries has errors of its own
        raise LeftOutError("unreadable", f"cannot read {url}: {in_a_line(error)}") from error


def in_a_line(error: BaseException) -> str:
    """Return one line about an error of the operating system or of a library."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".partition("\n")[0]


class _PlainFile(io.FileIO):
    """A file of this machine whose errors name it in one line."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except OSError as error:
            raise LeftOutError("unreadable", f"cannot read {self.name}: {in_a_line(error)}") from error


class _Stream(io.RawIOBase):
    """A file whose errors name it in one line."""

    def __init__(self, file: Any, url: str, seekable: bool) -> None:
        self._file, self._url, self._seekable = file, url, seekable

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)
        except Exception as error:
            raise LeftOutError("unreadable", f"cannot read {self._url}: {in_a_line(error)}") from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence) if self._seekable else super().seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell() if self._seekable else super().tell()

    def fileno(self) -> int:
        return self._file.fileno() if isinstance(self._file, io.FileIO) else super().fileno()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
