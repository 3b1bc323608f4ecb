"""Boundary of readers: every exception of a reader becomes damage of the document, with a time limit.

    reader ─▶ guarded ─▶ pieces of a document, or documents of a container; else BadDocumentError

Three kinds of errors pass unchanged, because the document did not cause them: errors that have a name already (all
CorpusErrors, and a missing package), errors of the operating system or of a connection, and a lack of memory.
"""

import errno
import math
import threading
import time
from collections.abc import Generator, Iterable
from typing import Any, BinaryIO, TypeVar, cast

from byteloom.core.packages import MissingPackageError
from data_pipeline.errors import BadDocumentError, CorpusError

T = TypeVar("T")

DOCUMENT_SECONDS = 900.0
"""Longest time that a reader may take for a piece of a document, or for the next document of a container."""

WRONG_PLACE = frozenset({errno.EINVAL, errno.EOVERFLOW})
"""Errors of a seek to a place that no file has, as damaged bytes may state it."""


class _Limit(threading.local):
    """Time limit of the reader that runs in this thread."""

    until = math.inf
    """Value of `time.monotonic` at which the limit ends."""


class _TooSlowError(Exception):
    """A reader took longer than the time limit."""


_limit = _Limit()


def guarded(results: Iterable[T], name: str) -> Generator[T, None, Any]:
    """Yield what a reader yields, and return what it returns. The consumer's time does not count against the limit.

    Args:
        results: pieces or documents of the reader.
        name: name of the file for errors.

    Raises:
        BadDocumentError: the reader raised an exception, or took longer than DOCUMENT_SECONDS for a result.
    """
    following = iter(results)
    while True:
        _limit.until = time.monotonic() + DOCUMENT_SECONDS
        try:
            result = next(following)
        except StopIteration as end:
            return end.value
        except Exception as error:
            if is_passed(error):
                raise
            raise BadDocumentError(f"{name} cannot be read: {described(error)}") from error
        finally:
            _limit.until = math.inf
        yield result


def is_passed(error: Exception) -> bool:
    """Return whether an error passes the boundary. Libraries raise OSErrors without a number for damaged bytes."""
    if isinstance(error, OSError):
        is_of_system = error.errno is not None and error.errno not in WRONG_PLACE
        return is_of_system or isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, CorpusError | MissingPackageError | MemoryError)


def described(error: Exception) -> str:
    """Return one line about an exception of a reader: its class and its message."""
    if isinstance(error, _TooSlowError):
        return str(error)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {text}".partition("\n")[0].rstrip(": ")


def check_time() -> None:
    """Raise an error if the reader of this thread has exceeded its time limit. Long loops call this."""
    if time.monotonic() > _limit.until:
        raise _TooSlowError(f"it took longer than {DOCUMENT_SECONDS:g} seconds")


def timed(stream: BinaryIO) -> BinaryIO:
    """Return the stream with a check of the time limit in each read, for decoders that read in a loop of their own."""
    return cast(BinaryIO, _Timed(stream))


class _Timed:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        check_time()
        return self._stream.read(size)

    def __repr__(self) -> str:  # Pillow's errors name its file
        return "of this content"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
