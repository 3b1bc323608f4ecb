"""Storage at a URL, through fsspec.

    read_ahead ─▶ SpanMemory ─▶ SpanCache ─▶ range request ─▶ server
                  (cache.py)                 byteloom.core.storage.remote_files: deadline, retries, credentials

A file that the manifest names exists, so "not found" and "forbidden" are retried until the deadline. The manifest
itself, and the list of withdrawn documents, may be absent: those answers count at once.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field

from byteloom.core.faults import FaultClass
from byteloom.core.retries import RequestError, RequestStoppedError, RetryPolicy
from byteloom.core.storage.locations import LocationText
from byteloom.core.storage.locks import lock_file
from byteloom.core.storage.remote_files import RemoteFiles
from byteloom.core.validation import Seconds
from data_pipeline.corpus.storage.cache import CacheLimits, Span, SpanCache, SpanMemory, remove_partial_files
from data_pipeline.errors import CorpusError, ForbiddenError, MissingFileError, ShardEndsError

log = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20
"""Size of the pieces in which whole files are read."""
DOWNLOADS = 8
"""Pieces of one file that are requested at once."""
REREADS = 4
"""Times that bytes are fetched before they count as damaged."""

T = TypeVar("T")


class RemoteConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Download of shards at a URL. A local folder ignores them."""

    cache: LocationText | None = None
    """Folder that keeps fetched blocks for the next epoch and the next run. The processes of a machine, and any number
    of corpora, share it."""
    cache_bytes: int = Field(default=64 << 30, ge=0)
    """Size limit of the blocks in the cache; the least recently used are removed. The index of each corpus (100 bytes a
    block) is kept beside them."""
    memory_bytes: int = Field(default=512 << 20, ge=0)
    """Limit of the compressed bytes that wait in memory for the stream. Each lane needs an extent: about 4 MiB of raw
    bytes, compressed. It needs 2 MiB more if rows have entropies. With a lower limit, bytes are fetched more than
    once."""
    cache_reserve_bytes: int = Field(default=1 << 30, ge=0)
    """Free space that the cache leaves on its disk. Without it, the cache removes blocks, or keeps none."""
    attempts: int = Field(default=20, ge=1)
    """Times a request is made before the corpus counts as unreadable."""
    backoff_seconds: float = Field(default=0.5, ge=0, le=1e9)
    """Longest pause after the first failed attempt. It doubles with each attempt, up to 30 s; each pause is drawn
    evenly between 0 and the longest. If a server says how long to wait, the pause is at least that, up to 30 s."""
    timeout_seconds: Seconds = 30.0
    """Time without a byte after which a request has failed. A request has also failed if it is not answered in full
    after this time and one second for each 128 KiB."""
    deadline_seconds: Seconds = 240.0
    """Time after which no further attempt at a request begins. Keep it below supervise.step_seconds, or a run whose
    storage is away is taken for one that hangs."""


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
        self._config = config
        self._spans = SpanMemory(config.memory_bytes)
        self._cache: SpanCache | None = None
        self._warned_of_ranges = False
        self._lock = threading.Lock()
        policy = RetryPolicy(config.attempts, config.backoff_seconds, config.deadline_seconds)
        try:
            self._files = RemoteFiles(url, policy, config.timeout_seconds)
        except ValueError as error:
            raise CorpusError(f"{url} cannot be opened: {error}") from error
        self.location = self._files.location

    def identify(self, digest: str) -> None:
        """Open the cache of the corpus. See `Storage.identify`."""
        if self._config.cache is not None:
            limits = CacheLimits(self._config.cache_bytes, self._config.cache_reserve_bytes)
            try:
                self._cache = SpanCache(Path(self._config.cache), limits, digest)
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
        """Return a range of a file that the manifest names. See `Storage.read`."""
        return self._retried(name, lambda: self._range(name, begin, end), is_known=True)

    def read_small(self, name: str) -> bytes:
        """Return a whole file. See `Storage.read_small`."""

        def request() -> bytes:
            content: bytes = self._files.request("cat_file", name, size=PIECE_BYTES)
            return content

        return self._retried(name, request, is_known=False)

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

    def read_index(self, name: str, size: int, digest: str, fresh: bool) -> bytes | bytearray:
        """Return an index file, from the cache if there is one. See `Storage.read_index`."""
        if self._cache is not None:
            try:
                return self._read_cached(self._cache, name, size, digest, fresh)
            except OSError as error:
                self._do_without_cache(error)
        return self._download(name, size)

    def _read_cached(self, cache: SpanCache, name: str, size: int, digest: str, fresh: bool) -> bytes | bytearray:
        folder = cache.indexes
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{digest}.npy"
        with lock_file(folder / "lock"):  # one process of a machine downloads; the others wait for it
            remove_partial_files(folder)
            if not fresh and path.exists():
                return path.read_bytes()
            content = self._download(name, size)
            if not cache.has_room(size):
                return content
            staging = path.with_name(path.name + ".partial")
            try:
                staging.write_bytes(content)
                staging.replace(path)
            except OSError as error:
                staging.unlink(missing_ok=True)
                log.warning("the cache %s cannot keep an index: %s", folder, error)
            return content

    def _download(self, name: str, size: int) -> bytearray:
        content = bytearray(size)

        def fetch(begin: int) -> None:
            end = min(begin + PIECE_BYTES, size)
            content[begin:end] = self.read(name, begin, end)

        with ThreadPoolExecutor(DOWNLOADS) as pool:
            list(pool.map(fetch, range(0, size, PIECE_BYTES)))
        return content

    def _range(self, name: str, begin: int, end: int) -> bytes:
        answer: bytes = self._files.request("cat_file", name, size=end - begin, start=begin, end=end)
        if len(answer) == end - begin:
            return answer
        if len(answer) < end:
            raise _WrongAnswerError(f"the server sent {len(answer):,} bytes instead of {end - begin:,}")
        with self._lock:
            warn, self._warned_of_ranges = not self._warned_of_ranges, True
        if warn:
            log.warning("%s sends whole files instead of parts of them, so reading is slow", self.location)
        return answer[begin:end]

    def _retried(self, name: str, attempt: Callable[[], T], *, is_known: bool) -> T:
        """Return the answer to a request, or raise the error of a corpus that its fault means."""
        what = f"{self.location}/{name}"
        try:
            return self._files.retried(name, attempt, is_known=is_known)
        except RequestStoppedError as error:
            raise CorpusError(f"{what} cannot be read: the corpus is closed") from error
        except RequestError as error:
            advice = _ADVICE if is_known else ""
            if error.is_missing:
                raise MissingFileError(f"{what} cannot be read: there is no such file{advice}") from error
            if error.is_refused:
                raise ForbiddenError(f"{what} cannot be read: {error}{advice}") from error
            if error.fault is FaultClass.DAMAGED:
                raise ShardEndsError(f"{what} cannot be read: {error}") from error
            raise CorpusError(f"{what} cannot be read: {error}") from error

    def close(self) -> None:
        """End all requests, those under way included. Their callers get a CorpusError."""
        self._files.close()


_ADVICE = ", though manifest.json names it; check that the copy at the URL is complete and that you may read it"


class _WrongAnswerError(Exception):
    """A server sent something else than what was requested."""
