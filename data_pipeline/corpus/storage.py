"""Where a corpus lies: a folder of this machine, or any URL that fsspec opens.

    Folder    ◀─ files opened once, read by range
    Remote    ◀─ spans in memory ◀─ spans on the local disk ◀─ range requests, tried again until they are whole

A span is a range of a file that one request brings: the blocks that will be read next. Nothing here knows what the
bytes should be. Whoever does asks for them `anew` when they are wrong.
"""

import errno
import logging
import os
import random
import tempfile
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, Field

from byteloom.core.locations import LocationText
from byteloom.core.locks import LockHeldError, lock_content, lock_file, lock_folder
from byteloom.core.packages import needed_by
from byteloom.core.urls import file_system
from byteloom.core.validation import Seconds
from data_pipeline.errors import CorpusError, CorruptBlockError, ForbiddenError, MissingFileError, ShardEndsError

log = logging.getLogger(__name__)

OPEN_FILES = 128
"""Files of a folder that are kept open at once."""
PIECE_BYTES = 8 << 20
"""Files that are read whole are read in pieces of this size."""
DOWNLOADS = 8
"""Pieces of one file that are asked for at once."""
MAX_PAUSE = 30.0
"""Seconds between two attempts, at most."""
QUIET_ATTEMPTS = 3
"""Attempts that may fail before the log says so."""
REREADS = 4
"""Attempts at bytes that come from afar and are not the ones that were written."""
TRANSIENT = frozenset({408, 425, 429})
"""Answers of the 400s after which it is worth asking again."""
FORBIDDEN = frozenset({401, 403})
"""Answers that say that a file may not be read."""

T = TypeVar("T")


class RemoteConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How shards that lie at a URL are fetched. A folder of this machine needs none of it."""

    cache: LocationText | None = None
    """Folder of this machine that keeps what was fetched, for the next epoch and the next run. The processes of a
    machine, and any number of corpora, share it."""
    cache_bytes: int = Field(default=64 << 30, ge=0)
    """Size of the blocks in the cache, at most; what was used longest ago goes first. The index of each corpus (108
    bytes a block) is kept beside them."""
    memory_bytes: int = Field(default=512 << 20, ge=0)
    """Compressed bytes kept in memory until the stream comes to them, at most. Each of its lanes wants an extent, some
    4 MiB of raw bytes, compressed; with less, bytes are fetched more than once."""
    attempts: int = Field(default=10, ge=1)
    """Times a request is made before the corpus counts as unreadable."""
    backoff_seconds: float = Field(default=0.5, ge=0, le=1e9)
    """Longest pause after the first failed attempt; it doubles with each, up to 30 s, and each pause is drawn evenly
    between 0 and the longest. A server that says how long to wait is obeyed, up to 30 s."""
    timeout_seconds: Seconds = 30.0
    """A connection that brings nothing for this long has failed."""


class Storage(Protocol):
    """The files of one corpus, by name. Safe to use from many threads."""

    location: str
    """As a person would name it."""
    rereads: int
    """Times it makes sense to ask for bytes that are not the ones that were written, the first included."""

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes begin … end - 1 of a file, all of them.

        Raises:
            CorruptBlockError: the disk does not give them, though the file is there.
            CorpusError: the file cannot be read.
        """

    def read_ahead(self, name: str, begin: int, end: int, span_end: int, anew: bool) -> bytes:
        """As `read`, of bytes that are followed by others, up to span_end - 1, that will be wanted soon.

        Args:
            anew: from the file itself, not from a cache.
        """

    def read_small(self, name: str) -> bytes:
        """A whole file that fits into memory.

        Raises:
            MissingFileError: there is none.
            ForbiddenError: it may not be read.
            CorpusError: it cannot be read.
        """

    def local_copy(self, name: str, size: int, digest: str, anew: bool) -> Path:
        """A whole file, on this machine; its content is still to be checked. Raises CorpusError.

        Args:
            digest: of its content, under which it may be kept.
            anew: not from a cache.
        """

    def identify(self, digest: str) -> None:
        """Tells which corpus this is, before `local_copy` and `read_ahead`: a cache keeps corpora apart by it."""

    def close(self) -> None:
        """Lets go of everything. Requests to afar that are still tried again end with a CorpusError."""


def open_storage(location: str | Path, config: RemoteConfig) -> Storage:
    """The storage of a folder or of a URL.

    Raises:
        CorpusError: nothing here opens URLs of this kind.
        MissingPackageError: the package that opens them is not installed.
    """
    return Remote(str(location), config) if "://" in str(location) else Folder(Path(location))


class _Descriptor:
    """An open file, closed when nothing refers to it: so no reader in another thread loses it while it reads."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Folder:
    """A folder of this machine."""

    rereads = 1

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self._descriptors = OrderedDict[str, _Descriptor]()
        self._lock = threading.Lock()

    def size(self, name: str) -> int:
        """Bytes of a file. Raises CorpusError where there is none."""
        try:
            return (self.path / name).stat().st_size
        except OSError as error:
            raise CorpusError(f"{self.path / name} cannot be read: {error.strerror}") from error

    def read(self, name: str, begin: int, end: int) -> bytes:
        try:
            span = os.pread(self._descriptor(name).number, end - begin, begin)
        except OSError as error:
            kind = CorruptBlockError if error.errno == errno.EIO else CorpusError
            raise kind(f"{self.path / name} cannot be read: {error.strerror}") from error
        if len(span) != end - begin:
            raise ShardEndsError(f"{self.path / name} ends before byte {end:,}")
        return span

    def read_ahead(self, name: str, begin: int, end: int, span_end: int, anew: bool) -> bytes:
        return self.read(name, begin, end)  # the page cache is ahead of us

    def read_small(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise MissingFileError(f"{self.path / name} cannot be read: there is no such file") from error
        except OSError as error:
            raise CorpusError(f"{self.path / name} cannot be read: {error.strerror}") from error

    def local_copy(self, name: str, size: int, digest: str, anew: bool) -> Path:
        return self.path / name

    def identify(self, digest: str) -> None:
        pass

    def _descriptor(self, name: str) -> _Descriptor:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = _Descriptor(self.path / name)
                if len(self._descriptors) > OPEN_FILES:
                    self._descriptors.popitem(last=False)
            self._descriptors.move_to_end(name)
            return self._descriptors[name]

    def close(self) -> None:
        with self._lock:
            self._descriptors.clear()


class Remote:
    """Files at a URL, through fsspec."""

    rereads = REREADS

    def __init__(self, url: str, config: RemoteConfig) -> None:
        self.location = url.rstrip("/")
        self._config = config
        self._spans = _SpanMemory(config.memory_bytes)
        self._cache: SpanCache | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._random = random.Random()  # of our own: a pause must not move a seeded generator
        self._warned_of_ranges = False
        self._closed = threading.Event()
        self._lock = threading.Lock()
        try:
            self._files, self._root = _file_system(self.location, config.timeout_seconds)
        except ValueError as error:
            raise CorpusError(f"{url} cannot be opened: {error}") from error

    def identify(self, digest: str) -> None:
        if self._config.cache is not None:
            try:
                self._cache = SpanCache(Path(self._config.cache), self._config.cache_bytes, digest)
            except OSError as error:
                self._do_without_cache(error)

    def _do_without_cache(self, error: OSError) -> None:
        log.warning("cannot use the cache %s, so reading is slower: %s", self._config.cache, error)
        self._cache = None

    def read(self, name: str, begin: int, end: int) -> bytes:
        return self._attempts(name, lambda: self._request(name, begin, end))

    def read_small(self, name: str) -> bytes:
        def request() -> bytes:
            content: bytes = self._files.cat_file(f"{self._root}/{name}")
            return content

        return self._attempts(name, request)

    def read_ahead(self, name: str, begin: int, end: int, span_end: int, anew: bool) -> bytes:
        if anew:
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

    def _fetch(self, span: "_Span") -> bytes:
        kept = self._cache.read(span.key) if self._cache is not None else None
        if kept is not None and len(kept) == span.end - span.begin:
            return kept
        content = self.read(span.name, span.begin, span.end)
        if self._cache is not None:
            self._cache.write(span.key, content)
        return content

    def local_copy(self, name: str, size: int, digest: str, anew: bool) -> Path:
        if self._cache is not None:
            try:
                return self._copy_in(self._cache.indexes, name, size, digest, anew)
            except OSError as error:
                self._do_without_cache(error)
        try:
            if self._temporary is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="byteloom-index-")
            return self._copy_in(Path(self._temporary.name), name, size, digest, anew)
        except OSError as error:
            raise CorpusError(f"{self.location}/{name} cannot be copied to this machine: {error}") from error

    def _copy_in(self, folder: Path, name: str, size: int, digest: str, anew: bool) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{digest}.npy"
        with lock_file(folder / "lock"):  # of the processes of a machine, one downloads and the others wait for it
            if anew or not path.exists():
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
        """The answer to a request, which is made again when it fails in a way that may pass."""
        what = f"{self.location}/{name}"
        longest = self._config.backoff_seconds
        for attempt in range(1, self._config.attempts + 1):
            if self._closed.is_set():
                raise CorpusError(f"{what} cannot be read: the corpus is closed")
            try:
                return request()
            except FileNotFoundError as error:
                raise MissingFileError(f"{what} cannot be read: there is no such file") from error
            except PermissionError as error:
                raise ForbiddenError(f"{what} cannot be read: {error or 'permission denied'}") from error
            except Exception as error:  # each backend has kinds of its own; the last one is told
                reason = _in_words(error)
                if getattr(error, "status", None) in FORBIDDEN:
                    raise ForbiddenError(f"{what} cannot be read: {reason}") from error
                if _is_permanent(error) or attempt == self._config.attempts:
                    times = f" (attempt {attempt} of {self._config.attempts})"
                    raise CorpusError(f"{what} cannot be read: {reason}{times}") from error
                pause = min(MAX_PAUSE, max(self._random.uniform(0, longest), _asked_to_wait(error)))
            if attempt >= QUIET_ATTEMPTS:
                log.warning("%s: %s; attempt %d of %d failed", what, reason, attempt, self._config.attempts)
            self._closed.wait(pause)
            longest = min(MAX_PAUSE, 2 * longest)
        raise AssertionError("a last attempt returns or raises")

    def close(self) -> None:
        self._closed.set()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None


class _WrongAnswerError(Exception):
    """A server sent something else than what it was asked for."""


def _file_system(url: str, timeout: float) -> tuple[Any, str]:
    """The file system of a URL and the path in it, without caches or attempts of its own."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("http", "https"):
        with needed_by(url, "aiohttp"):
            import aiohttp  # noqa: PLC0415 - a third of a second that only URLs are worth

        limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        # A server that compresses on the way would answer with ranges of something else.
        options |= {"client_kwargs": {"timeout": limits}, "headers": {"Accept-Encoding": "identity"}}
    elif protocol in ("s3", "s3a"):
        times = {"connect_timeout": timeout, "read_timeout": timeout}
        options["config_kwargs"] = {**times, "retries": {"total_max_attempts": 1}}
    files, root = file_system(url, **options)
    if protocol in ("s3", "s3a"):
        files.retries = 1
    return files, root


def _is_permanent(error: Exception) -> bool:
    """Whether an HTTP status says that asking again is useless."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in TRANSIENT


def _asked_to_wait(error: Exception) -> float:
    """Seconds that the server asked us to wait; 0 when it did not, or named a date."""
    headers = getattr(error, "headers", None) or {}
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def _in_words(error: Exception) -> str:
    """One line of an error; those of time-outs have no words of their own."""
    said = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@dataclass(eq=False)
class _Span:
    """A range of a file, fetched or being fetched."""

    name: str
    begin: int
    end: int
    content: "Future[bytes]" = field(default_factory=Future)

    @property
    def key(self) -> str:
        return f"{self.name}.{self.begin}-{self.end}"


class _SpanMemory:
    """Spans in memory, those used longest ago forgotten first. Threads that want one span wait for one fetch."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._by_name = defaultdict[str, list[_Span]](list)
        self._in_order = OrderedDict[_Span, None]()
        self._lock = threading.Lock()

    def find_or_add(self, name: str, begin: int, end: int, span_end: int) -> tuple[_Span, bool]:
        """A span that holds bytes begin … end - 1 of a file; or a new one, begin … span_end - 1, to be fetched."""
        with self._lock:
            for span in self._by_name[name]:
                if span.begin <= begin and end <= span.end:
                    self._in_order.move_to_end(span)
                    return span, False
            span = _Span(name, begin, span_end)
            self._by_name[name].append(span)
            self._in_order[span] = None
            self._bytes += span.end - span.begin
            while self._bytes > self._limit and len(self._in_order) > 1:
                self._remove(next(iter(self._in_order)))
            return span, True

    def forget(self, name: str, begin: int, end: int) -> list[_Span]:
        """Removes and returns the spans that hold bytes begin … end - 1 of a file."""
        with self._lock:
            spans = [span for span in self._by_name[name] if span.begin <= begin and end <= span.end]
            for span in spans:
                self._remove(span)
            return spans

    def _remove(self, span: _Span) -> None:
        del self._in_order[span]
        self._by_name[span.name].remove(span)
        self._bytes -= span.end - span.begin


class SpanCache:
    """Spans as files, under a limit that all processes and corpora that share the folder keep together.

    A cache may fail, and may be damaged: it then holds less, and the span is fetched.

    Args:
        folder: of all corpora.
        limit: bytes of all spans in it.
        digest: which corpus this is.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int, digest: str) -> None:
        self.indexes = folder / "indexes"
        """Where index files are kept, of all corpora."""
        self._spans = folder / "spans"
        self._own = self._spans / digest
        self._total = folder / "spans.total"  # bytes; under its lock room is made
        self._limit = limit
        self._warned = False
        self._own.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> bytes | None:
        path = self._own / key
        try:
            content = path.read_bytes()
            os.utime(path)  # its place in the order of use
        except OSError:
            return None
        return content

    def write(self, key: str, content: bytes) -> None:
        if len(content) > self._limit:
            return
        staging = self._own / f"{key}.{os.getpid()}-{threading.get_ident()}.partial"
        try:
            self._make_room(len(content))
            staging.write_bytes(content)
            staging.replace(self._own / key)
        except OSError as error:
            self._warn(error)

    def remove(self, key: str) -> None:
        try:
            (self._own / key).unlink(missing_ok=True)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning("the cache %s cannot be written: %s", self._own, error)
        self._warned = True

    def _make_room(self, size: int) -> None:
        with lock_content(self._total) as file:
            # A writer that dies after this counted bytes it never wrote; the next count of the files mends that.
            noted = os.pread(file, 32, 0)
            total = int(noted) if noted.isdigit() else self._limit
            if total + size > self._limit:
                total = self._evict(max(0, int(0.9 * self._limit) - size))
            os.ftruncate(file, 0)
            os.pwrite(file, str(total + size).encode(), 0)

    def _evict(self, limit: int) -> int:
        """Removes the files used longest ago until `limit` bytes are left; returns how many are."""
        files = []
        for path in self._spans.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


@contextmanager
def only_writer(folder: Path, wait: bool) -> Iterator[None]:
    """Keeps others that change a corpus out of its folder. Ends with the process, however that ends.

    Args:
        wait: for another to be done.

    Raises:
        CorpusError: there is no such folder; or another process is changing it, and this one is not to wait.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(folder, wait=wait))
        except LockHeldError as error:
            raise CorpusError(f"another process is changing {folder}") from error
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorpusError(f"there is no corpus at {folder}: {error.strerror}") from error
        except OSError as error:
            raise CorpusError(f"{folder} cannot be locked: {error.strerror}") from error
        yield
