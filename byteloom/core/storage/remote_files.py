"""Files below a URL: every request has a deadline, is repeated while its fault is passing, and can be stopped.

request ─▶ retry (byteloom.core.retries) ─▶ attempt ─▶ fsspec's event loop, or a thread
             ▲                                │
             └── fresh file system ◀── refused credentials, abandoned thread
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from byteloom.core.faults import credentials_expired, is_refused
from byteloom.core.retries import RequestStoppedError, RetryPolicy, retry
from byteloom.core.storage.urls import file_system, is_web, join_url, without_query

SLOWEST_RATE = 128 << 10
"""Bytes a second that a request must bring on average, after its first seconds."""

T = TypeVar("T")


class AbandonedError(TimeoutError):
    """A request had no complete answer at its deadline, and nobody waits for it any more."""


def is_asynchronous(files: Any) -> bool:
    """Return whether fsspec runs a file system's requests in its event loop, where they can be cancelled."""
    return bool(getattr(files, "async_impl", False))


def in_thread(call: Callable[[], T]) -> "Future[T]":
    """Start a call in a thread of its own. The thread may be abandoned: it does not keep the process alive."""
    answer = Future[T]()

    def run() -> None:
        with suppress(InvalidStateError):  # nobody waits any more
            try:
                answer.set_result(call())
            except Exception as error:
                answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="request").start()
    return answer


class RemoteFiles:
    """Files below a URL, through fsspec. Many threads may use it.

    A request of a file system that fsspec does not run asynchronously, such as SFTP, runs in a thread. At its deadline,
    the thread and its file system are abandoned.

    Args:
        url: URL of the folder.
        policy: how requests are repeated.
        timeout_seconds: time for a connection, for the next bytes, and for the first bytes of an answer.
        client_attempts: times that the client of S3 makes a request within one attempt.

    Raises:
        ValueError: fsspec knows no URLs of this kind.
        MissingPackageError: the package for URLs of this kind is not installed.
    """

    def __init__(self, url: str, policy: RetryPolicy, timeout_seconds: float, client_attempts: int = 1) -> None:
        self.location = without_query(url)
        """The URL without a query, for messages."""
        self._url = url
        self._policy = policy
        self._timeout = timeout_seconds
        self._client_attempts = client_attempts
        self._running = set[Future[Any]]()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._files, self._root = self._connect()

    def _connect(self) -> tuple[Any, str]:
        """Return a file system with credentials of its own, and the path of the folder in it."""
        seconds, attempts = self._timeout, self._client_attempts
        files, root = file_system(self._url, connect_seconds=seconds, read_seconds=seconds, attempts=attempts)
        return files, root.rstrip("/")

    @property
    def files(self) -> Any:
        """The file system of fsspec. It may be replaced after credentials were refused."""
        return self._files

    def path(self, name: str = "") -> str:
        """Return the path of a file in the file system; of the folder if there is no name."""
        if not name:
            return self._root
        return join_url(self._root, name) if is_web(self._url) else f"{self._root}/{name}"

    def request(self, method: str, name: str, *arguments: Any, size: int = 0, **options: Any) -> Any:
        """Make one attempt at a request.

        Args:
            method: method of the file system that takes a path.
            name: name of the file.
            *arguments: further arguments of the method.
            size: bytes that the request moves, which its deadline depends on.
            **options: further arguments of the method.

        Raises:
            RequestStoppedError: `close` was called.
            TimeoutError: the answer was not complete in time.
            Exception: whatever fsspec's libraries raise.
        """
        files = self._files
        try:
            if not is_asynchronous(files):
                call = partial(getattr(files, method), self.path(name), *arguments, **options)
                return self._answer(in_thread(call), size)
            asked = getattr(files, f"_{method}")(self.path(name), *arguments, **options)
            return self._answer(asyncio.run_coroutine_threadsafe(asked, files.loop), size)
        except Exception as error:
            self.note_failure(files, error)
            raise

    def _answer(self, request: "Future[Any]", size: int) -> Any:
        """Wait for the answer to a request; cancel the request at its deadline."""
        with self._lock:
            self._running.add(request)
        if self._stopped.is_set():  # `close` may have been called before the request was added
            request.cancel()
        seconds = self._timeout + size / SLOWEST_RATE
        try:
            return request.result(seconds)
        except CancelledError as error:
            raise RequestStoppedError from error
        except TimeoutError as error:
            if request.done():  # a time-out of the client
                raise
            request.cancel()
            raise AbandonedError(f"the answer was not complete after {seconds:.3g} s") from error
        finally:
            with self._lock:
                self._running.discard(request)

    def note_failure(self, used: Any, error: BaseException) -> None:
        """Replace a file system whose credentials were refused, or that does not answer, before the next attempt."""
        is_stuck = isinstance(error, AbandonedError) and not is_asynchronous(used)
        if is_stuck or credentials_expired(error) or is_refused(error):
            with self._lock:
                if self._files is used:
                    self._files, self._root = self._connect()

    def retried(self, name: str, attempt: Callable[[], T], *, is_known: bool = False) -> T:
        """Return the result of a function that makes requests. Repeat it as the policy says.

        Args:
            name: name of the file, for the log.
            attempt: makes one attempt, with `request`.
            is_known: see `byteloom.core.faults.class_of`.

        Raises:
            RequestError: the last attempt failed, or a retry cannot help.
            RequestStoppedError: `close` was called.
        """
        return retry(attempt, self._policy, f"{self.location}/{name}", is_known=is_known, stopped=self._stopped)

    def close(self) -> None:
        """Stop all requests; their threads raise RequestStoppedError at once."""
        self._stopped.set()
        with self._lock:
            running = list(self._running)
        for request in running:
            request.cancel()
