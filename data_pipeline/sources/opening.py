"""Opening of source files: on this machine, at a URL, or from a program.

    open_file(url) ─▶ a stream that is opened again, where it was, while a fault of the transport passes

A fault of the transport is never a bad document: it ends the work, which can be started again. Other errors name the
file, which can be left out.

fsspec opens URLs. Its own configuration and the usual environment variables (AWS_ENDPOINT_URL, FSSPEC_S3_ANON, …)
apply. Only a source that the user wrote as `pipe:COMMAND` runs a program; see
`data_pipeline.readers.formats.webdataset`.
"""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from byteloom.core.faults import FaultClass, credentials_expired, hide_queries, status_of
from byteloom.core.packages import MissingPackageError
from byteloom.core.retries import RequestError, RetryPolicy, retry
from byteloom.core.storage.remote_files import AbandonedError, in_thread, is_asynchronous
from byteloom.core.storage.urls import file_system, is_url, is_web, without_query
from data_pipeline.errors import CorpusError, UnreachableError
from data_pipeline.sources.source_file import LeftOutError, SourceFile

STREAM_BYTES = 64 << 10
"""Size of the reads that small reads are made of. Most files are not much larger."""
READ_AHEAD_BYTES = 8 << 20
"""Size of one request to an object store."""
CONNECT_SECONDS = 60.0
"""Longest time to connect to a web server."""
READ_SECONDS = 300.0
"""Longest time to wait for the next bytes of a web server, or of a file system without time-outs of its own."""
SOURCE_POLICY = RetryPolicy(attempts=20, backoff_seconds=0.5, deadline_seconds=300.0)
"""Limits of the attempts at a source that sends no byte."""

QUESTION_POLICY = RetryPolicy(attempts=6, backoff_seconds=0.5, deadline_seconds=60.0)
"""Limits of the attempts at a question about a file. They are short, because a person waits for the answer."""
FINAL = (CorpusError, MissingPackageError)
"""Errors that no second attempt changes."""

T = TypeVar("T")


def source_file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a source's URL, and the path in it. See `byteloom.core.storage.urls.file_system`."""
    if is_web(url):
        return file_system(url, connect_seconds=CONNECT_SECONDS, read_seconds=READ_SECONDS)
    return file_system(url)


def ask(url: str, request: Callable[[], T]) -> T:
    """Return the answer to a question about a source. Repeat it while its fault is passing.

    Raises:
        Exception: whatever the last attempt raised.
    """
    files, _ = source_file_system(url)

    def attempt() -> T:
        return request() if is_asynchronous(files) else _within_limit(request)

    try:
        return retry(attempt, QUESTION_POLICY, without_query(url), final=FINAL)
    except RequestError as error:
        assert error.__cause__ is not None
        raise error.__cause__ from error.__cause__.__cause__


def read_small(file: SourceFile) -> bytes | None:
    """Return the content of a small file of this machine, in four system calls.

    The result is None if the file is at a URL, cannot be read, or is not as it was listed. `open_file` and
    `refuse_changed` then say what is wrong.
    """
    if file.size is None or is_url(file.url):
        return None
    try:
        descriptor = os.open(file.url, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = os.read(descriptor, file.size + 1)
            version = str(os.fstat(descriptor).st_mtime_ns)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    return content if len(content) == file.size and file.version in (None, version) else None


def open_file(url: str, buffered: bool = True) -> BinaryIO:
    """Open a file for reading at its start. A web page is streamed; an object store is read by range.

    Args:
        url: a path or a URL.
        buffered: make small reads cheap. Without it, a file of this machine is opened faster.

    Raises:
        BadDocumentError: the file cannot be opened. Reading it raises the same error.
        UnreachableError: its place does not answer. Reading it raises the same error.
    """
    if not is_url(url) and not buffered:
        try:
            return cast(BinaryIO, _PlainFile(url))
        except OSError:
            return cast(BinaryIO, _read_again(url, lambda: _PlainFile(url)))
    place = _Web(url) if is_web(url) else _Object(url) if is_url(url) else _LocalFile(url)
    return io.BufferedReader(_Stream(place), STREAM_BYTES)


def in_a_line(error: BaseException) -> str:
    """Return one line about an error of the operating system or of a library."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return hide_queries(f"{type(error).__name__}: {error}".partition("\n")[0])


def _read_again(
    url: str, attempt: Callable[[], T], before_retry: Callable[[BaseException], None] = lambda _: None
) -> T:
    """Return the result of a function that reads a source. Repeat it while its fault is passing.

    Raises:
        UnreachableError: the fault did not pass.
        BadDocumentError: the file cannot be read for another reason.
    """
    try:
        return retry(attempt, SOURCE_POLICY, without_query(url), before_retry=before_retry, final=FINAL)
    except FINAL:
        raise
    except RequestError as error:
        if error.fault is FaultClass.PASSING:
            raise UnreachableError(
                f"cannot read {without_query(url)}: {error}. Start the same command again when it can be read; "
                "finished work is kept"
            ) from error
        assert error.__cause__ is not None
        raise LeftOutError("unreadable", f"cannot read {without_query(url)}: {in_a_line(error.__cause__)}") from error
    except Exception as error:  # each of fsspec's libraries has errors of its own
        raise LeftOutError("unreadable", f"cannot read {without_query(url)}: {in_a_line(error)}") from error


class _PlainFile(io.FileIO):
    """A file of this machine. It is opened fast, and again only after an error."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except OSError:
            place = self.tell()

        def again() -> bytes:
            io.FileIO.__init__(self, self.name)
            self.seek(place)
            return io.FileIO.read(self, size)

        return _read_again(str(self.name), again)


class _Source(ABC):
    """A file that can be opened at any place.

    Args:
        url: path or URL of the file.
    """

    seekable = True
    """True if a reader may move to any place, because opening the file there is cheap."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._version: tuple[Any, ...] | None = None

    @abstractmethod
    def open_at(self, place: int) -> Any:
        """Return the file, open at a place.

        Raises:
            CorpusError: the file is not the one that was opened first.
        """

    def refuse(self, error: BaseException) -> None:  # noqa: B027 most files need nothing
        """Prepare the next attempt after a failed one."""

    def _check_version(self, version: tuple[Any, ...]) -> None:
        """Raise a CorpusError if the version is not that of the first opening."""
        if self._version not in (None, version):
            raise self._changed()
        self._version = version

    def _changed(self) -> CorpusError:
        return CorpusError(f"{without_query(self.url)} has changed while it was read; start the same command again")


class _LocalFile(_Source):
    """A file of this machine."""

    def open_at(self, place: int) -> Any:
        file = io.FileIO(self.url)
        file.seek(place)
        return file


class _Object(_Source):
    """A file of an object store, or of another file system of fsspec, which is read by range."""

    def open_at(self, place: int) -> Any:
        files, path = source_file_system(self.url)
        if is_asynchronous(files):
            return self._open(files, path, place)
        return _WaitingFile(_within_limit(lambda: self._open(files, path, place)))

    def _open(self, files: Any, path: str, place: int) -> Any:
        file = files.open(path, "rb", block_size=READ_AHEAD_BYTES, cache_type="readahead")
        details = getattr(file, "details", None) or {}
        self._check_version(tuple(details.get(name) for name in ("size", "ETag", "LastModified", "mtime")))
        file.seek(place)
        return file

    def refuse(self, error: BaseException) -> None:
        """Look for new credentials if the old ones have expired; connect again if a connection was abandoned."""
        if credentials_expired(error) or isinstance(error, AbandonedError):
            type(source_file_system(self.url)[0]).clear_instance_cache()


class _WaitingFile:
    """A file whose reads have no deadline of their own, as those of SFTP. Each runs in a thread until READ_SECONDS."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._is_abandoned = False

    def readinto(self, buffer: Any) -> int:
        """Read bytes into a buffer, and return their number."""
        content = self._within_limit(lambda: self._file.read(len(buffer)))  # an abandoned read must not use the buffer
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int) -> int:
        """Move to a place in the file."""
        return self._within_limit(lambda: self._file.seek(offset, whence))

    def _within_limit(self, call: Callable[[], T]) -> T:
        try:
            return _within_limit(call)
        except AbandonedError:
            self._is_abandoned = True
            raise

    def close(self) -> None:
        """Close the file, unless an abandoned thread still uses it."""
        if not self._is_abandoned:
            self._file.close()


def _within_limit(call: Callable[[], T]) -> T:
    """Return the result of a call in a thread, which is abandoned after READ_SECONDS."""
    try:
        return (answer := in_thread(call)).result(READ_SECONDS)
    except TimeoutError as error:
        if answer.done():  # a time-out of the call
            raise
        raise AbandonedError(f"there was no answer for {READ_SECONDS:g} s") from error


class _Web(_Source):
    """A file of a web server, which is streamed: some servers ignore ranges. Its stream can be resumed."""

    seekable = False

    def open_at(self, place: int) -> Any:
        """Request the rest of the file. If the server sends the whole file, skip the part before the place."""
        files, path = source_file_system(self.url)
        wanted = {"headers": {"Accept-Encoding": "identity"} | ({"Range": f"bytes={place}-"} if place else {})}
        try:
            # Without a block size, fsspec makes one request and streams the answer; with a size, it asks for none.
            file = files.open(path, "rb", block_size=0, size=1, **wanted)
        except Exception as error:
            if status_of(error) == 416 and self._version is not None:
                if self._version[0] == str(place):
                    return io.BytesIO()  # all bytes had come when the connection was cut
                raise self._changed() from error
            raise
        answered = file.r.headers
        length = answered.get("Content-Range", "").rpartition("/")[2] or answered.get("Content-Length")
        self._check_version((length, answered.get("Last-Modified") or answered.get("ETag")))
        rest = 0 if file.r.status == 206 else place
        while rest:
            skipped = len(file.read(min(rest, READ_AHEAD_BYTES)))
            if not skipped:
                raise self._changed()
            rest -= skipped
        return file


class _Stream(io.RawIOBase):
    """A source file. After a passing fault it is opened again where it was."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._place = 0
        self._file: Any = None
        self._retried(self._opened)

    def _opened(self) -> Any:
        if self._file is None:
            self._file = self._source.open_at(self._place)
        return self._file

    def _retried(self, attempt: Callable[[], T]) -> T:
        return _read_again(self._source.url, attempt, self._drop)

    def _drop(self, error: BaseException) -> None:
        """Close the file after a failed attempt, so that the next one opens it again."""
        self._source.refuse(error)
        if self._file is not None:
            self._file.close()
            self._file = None

    def readinto(self, buffer: Any) -> int:
        count: int = self._retried(lambda: self._opened().readinto(buffer))
        self._place += count
        return count

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._source.seekable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self._source.seekable:
            return super().seek(offset, whence)
        self._place = self._retried(lambda: self._opened().seek(offset, whence))
        return self._place

    def tell(self) -> int:
        return self._place if self._source.seekable else super().tell()

    def fileno(self) -> int:
        return self._file.fileno() if isinstance(self._file, io.FileIO) else super().fileno()

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()
