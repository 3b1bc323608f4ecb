"""Storage at a URL, through fsspec.

    read_ahead ─▶ SpanMemory ─▶ SpanCache ─▶ range request ─▶ server
                  (cache.py)                 repeated by tenacity while the failure may pass

A request that fails is repeated with growing pauses, unless its answer says that repeating is useless.
"""

import logging
import random
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from byteloom.core.locations import LocationText
from byteloom.core.locks import lock_file
from byteloom.core.urls import file_system
from byteloom.core.validation import Seconds
from data_pipeline.corpus.cache import Span, SpanCache, SpanMemory
from data_pipeline.errors import CorpusError, ForbiddenError, MissingFileError

log = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20
"""Size of the pieces in which whole files are read."""
DOWNLOADS = 8
"""Pieces of one file that are requested at once."""
MAX_PAUSE = 30.0
"""Longest pause between two attempts, in seconds."""
QUIET_ATTEMPTS = 3
"""Number of the first failed attempt that is logged."""
REREADS = 4
"""Times that bytes are fetched before they count as damaged."""
TRANSIENT = frozenset({408, 425, 429})
"""HTTP statuses of the 400s after which a request is repeated."""
FORBIDDEN = frozenset({401, 403})
"""HTTP statuses that forbid reading a file."""

T = TypeVar("T")


class RemoteConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How shards at a URL are fetched. A folder of this machine ignores it."""

    cache: LocationText | None = None
    """Folder of this machine that keeps fetched blocks for the next epoch and the next run. The processes of a machine,
    and any number of corpora, share it."""
    cache_bytes: int = Field(default=64 << 30, ge=0)
    """Size limit of the blocks in the cache; the least recently used are removed. The index of each corpus (108 bytes a
    block) is kept beside them."""
    memory_bytes: int = Field(default=512 << 20, ge=0)
    """Limit of the compressed bytes that wait in memory for the stream. Each lane needs an extent: about 4 MiB of raw
    bytes, compressed. With a lower limit, bytes are fetched more than once."""
    attempts: int = Field(default=10, ge=1)
    """Times a request is made before the corpus counts as unreadable."""
    backoff_seconds: float = Field(default=0.5, ge=0, le=1e9)
    """Longest pause after the first failed attempt. It doubles with each attempt, up to 30 s; each pause is drawn
    evenly between 0 and the longest. If a server says how long to wait, the pause is at least that, up to 30 s."""
    timeout_seconds: Seconds = 30.0
    """A connection that brings nothing for this long has failed."""


class Remote:
    """Files of a corpus at a URL.

    Args:
        url: URL of the corpus.
        config: how its files are fetched.

    Raises:
        CorpusError: URLs of this kind cannot be opened.
        MissingPackageError: the package that opens them is not installed.
    """

    rereads = REREADS
    local_folder: Path | None = None

    def __init__(self, url: str, config: RemoteConfig) -> None:
        self.location = url.rstrip("/")
        self._config = config
        self._spans = SpanMemory(config.memory_bytes)
        self._cache: SpanCache | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._random = random.Random()  # its own: a pause must not advance a seeded generator
        self._longest_pause = wait_exponential(config.backoff_seconds, max=MAX_PAUSE)
        self._warned_of_ranges = False
        self._closed = threading.Event()
        self._lock = threading.Lock()
        timeout = config.timeout_seconds
        try:
            self._files, self._root = file_system(
                self.location, connect_seconds=timeout, read_seconds=timeout, attempts=1
            )
        except ValueError as error:
            raise CorpusError(f"{url} cannot be opened: {error}") from error

    def identify(self, digest: str) -> None:
        """Open the cache of the corpus. See `Storage.identify`."""
        if self._config.cache is not None:
            try:
                self._cache = SpanCache(Path(self._config.cache), self._config.cache_bytes, digest)
            except OSError as error:
                self._do_without_cache(error)

    def _do_without_cache(self, error: OSError) -> None:
        log.warning("cannot use the cache %s, so reading is slower: %s", self._config.cache, error)
        self._cache = None

    def check_presence(self) -> None:
        """Do nothing: reading the manifest shows whether there is one."""

    def check_size(self, name: str, size: int) -> None:
        """Do nothing: it would cost a request for each file."""

    def shard_files(self) -> list[Path]:
        """Return no file: many servers list none."""
        return []

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return a range of a file. See `Storage.read`."""
        return self._attempts(name, lambda: self._request(name, begin, end))

    def read_small(self, name: str) -> bytes:
        """Return a whole file. See `Storage.read_small`."""

        def request() -> bytes:
            content: bytes = self._files.cat_file(f"{self._root}/{name}")
            return content

        return self._attempts(name, request)

    def read_ahead(self, name: str, begin: int, end: int, span_end: int, fresh: bool) -> bytes:
        """Return a range of a file from the span that holds it. See `Storage.read_ahead`."""
        if fresh:
            for span in self._spans.forget(name, begin, end):
                if self._cache is not None:
                    self._cache.remove(span.key)
            return self.read(name, begin, end)
        span, is_new = self._spans.find_or_add(name, begin, end, span_end)
        if is_new:
            try:
                span.content.set_result(self._fetch(span))
            except BaseException as error:
                self._spans.forget(name, begin, end)
                span.content.set_exception(error)
                raise
        content = span.content.result()
        return content[begin - span.begin : end - span.begin]

    def _fetch(self, span: Span) -> bytes:
        kept = self._cache.read(span.key) if self._cache is not None else None
        if kept is not None and len(kept) == span.end - span.begin:
            return kept
        content = self.read(span.name, span.begin, span.end)
        if self._cache is not None:
            self._cache.write(span.key, content)
        return content

    def local_copy(self, name: str, size: int, digest: str, fresh: bool) -> Path:
        """Return the path of a copy of a file, in the cache or in a temporary folder. See `Storage.local_copy`."""
        if self._cache is not None:
            try:
                return self._copy_in(self._cache.indexes, name, size, digest, fresh)
            except OSError as error:
                self._do_without_cache(error)
        try:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="byteloom-index-")
            return self._copy_in(Path(self._temporary.name), name, size, digest, fresh)
        except OSError as error:
            raise CorpusError(f"{self.location}/{name} cannot be copied to this machine: {error}") from error

    def _copy_in(self, folder: Path, name: str, size: int, digest: str, fresh: bool) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{digest}.npy"
        with lock_file(folder / "lock"):  # one process of a machine downloads; the others wait for it
            if fresh or not path.exists():
                self._download(name, size, path)
        return path

    def _download(self, name: str, size: int, path: Path) -> None:
        staging = path.with_name(path.name + ".partial")
        begins = range(0, size, PIECE_BYTES)
        with staging.open("wb") as file, ThreadPoolExecutor(DOWNLOADS) as pool:
            for group in range(0, len(begins), DOWNLOADS):
                file.writelines(
                    pool.map(
                        lambda begin: self.read(name, begin, min(begin + PIECE_BYTES, size)),
                        begins[group : group + DOWNLOADS],
                    )
                )
        staging.replace(path)

    def _request(self, name: str, begin: int, end: int) -> bytes:
        answer: bytes = self._files.cat_file(f"{self._root}/{name}", start=begin, end=end)
        if len(answer) == end - begin:
            return answer
        if len(answer) < end:
            raise _WrongAnswerError(f"the server sent {len(answer):,} bytes instead of {end - begin:,}")
        with self._lock:
            warn, self._warned_of_ranges = not self._warned_of_ranges, True
        if warn:
            log.warning("%s sends whole files instead of parts of them, so reading is slow", self.location)
        return answer[begin:end]

    def _attempts(self, name: str, request: Callable[[], T]) -> T:
        """Return the answer to a request; repeat the request while its failure may pass."""
        what, most = f"{self.location}/{name}", self._config.attempts

        def attempt() -> T:
            if self._closed.is_set():
                raise CorpusError(f"{what} cannot be read: the corpus is closed")
            try:
                return request()
            except FileNotFoundError as error:
                raise MissingFileError(f"{what} cannot be read: there is no such file") from error
            except PermissionError as error:
                raise ForbiddenError(f"{what} cannot be read: {error or 'permission denied'}") from error
            except Exception as error:
                if getattr(error, "status", None) in FORBIDDEN:
                    raise ForbiddenError(f"{what} cannot be read: {_in_words(error)}") from error
                raise

        def log_failure(state: RetryCallState) -> None:
            if state.attempt_number >= QUIET_ATTEMPTS:
                log.warning(
                    "%s: %s; attempt %d of %d failed", what, _in_words(_error(state)), state.attempt_number, most
                )

        retrying = Retrying(
            stop=stop_after_attempt(most),
            wait=self._pause,
            retry=retry_if_exception(_may_pass),
            sleep=self._wait,
            before_sleep=log_failure,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except CorpusError:
            raise
        except Exception as error:  # each of fsspec's libraries has errors of its own
            times = f" (attempt {retrying.statistics['attempt_number']} of {most})"
            raise CorpusError(f"{what} cannot be read: {_in_words(error)}{times}") from error

    def _pause(self, state: RetryCallState) -> float:
        """Return the seconds to wait after a failed attempt."""
        drawn = self._random.uniform(0, self._longest_pause(state))
        return min(MAX_PAUSE, max(drawn, _retry_after(_error(state))))

    def _wait(self, seconds: float) -> None:
        """Wait; `close` ends the pause."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Delete temporary copies. Requests that are being repeated end with a CorpusError."""
        self._closed.set()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None


class _WrongAnswerError(Exception):
    """A server sent something else than what was requested."""


def _error(state: RetryCallState) -> BaseException:
    """Return the error of a failed attempt."""
    error = state.outcome.exception() if state.outcome is not None else None
    assert error is not None, "only failed attempts are followed by a pause"
    return error


def _may_pass(error: BaseException) -> bool:
    """Return whether a request that failed with this error may succeed later."""
    if not isinstance(error, Exception) or isinstance(error, CorpusError):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in TRANSIENT)


def _retry_after(error: BaseException) -> float:
    """Return the seconds in the server's Retry-After header; 0 if there is none, or if it holds a date."""
    headers = getattr(error, "headers", None) or {}
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def _in_words(error: BaseException) -> str:
    """Return one line about an error. Errors of time-outs have only their names."""
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
