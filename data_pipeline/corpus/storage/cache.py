"""Spans of remote files, kept in memory and on the local disk.

A span is a range of a file that one request fetches: the blocks that are read next.
"""

import contextlib
import logging
import os
import threading
from collections import OrderedDict, defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from byteloom.core.faults import FULL_ERRNOS
from byteloom.core.storage.locks import lock_content

log = logging.getLogger(__name__)

PARTIAL = ".partial"
"""End of the name of a file that is being written. The number of its process comes before it."""


@dataclass(eq=False)
class Span:
    """A range of a file that is fetched, or is being fetched."""

    name: str
    """Name of the file."""
    begin: int
    end: int
    content: "Future[bytes]" = field(default_factory=Future)

    @property
    def key(self) -> str:
        """Name of the span in a cache, which is no path."""
        return f"{self.name.replace('/', '_')}.{self.begin}-{self.end}"


class SpanMemory:
    """Spans in memory; the least recently used are dropped. Threads that need one span wait for one fetch.

    Args:
        limit: size of all spans in bytes. One span stays, whatever its size.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._by_name = defaultdict[str, list[Span]](list)
        self._in_order = OrderedDict[Span, None]()
        self._lock = threading.Lock()

    def find_or_add(self, name: str, begin: int, end: int, span_end: int) -> tuple[Span, bool]:
        """Return a span that holds bytes begin … end - 1 of a file, and whether it is new.

        A new span holds bytes begin … span_end - 1; the caller fetches it.
        """
        with self._lock:
            for span in self._by_name[name]:
                if span.begin <= begin and end <= span.end:
                    self._in_order.move_to_end(span)
                    return span, False
            span = Span(name, begin, span_end)
            self._by_name[name].append(span)
            self._in_order[span] = None
            self._bytes += span.end - span.begin
            while self._bytes > self._limit and len(self._in_order) > 1:
                self._remove(next(iter(self._in_order)))
            return span, True

    def forget(self, name: str, begin: int, end: int) -> list[Span]:
        """Remove and return the spans that hold bytes begin … end - 1 of a file."""
        with self._lock:
            spans = [span for span in self._by_name[name] if span.begin <= begin and end <= span.end]
            for span in spans:
                self._remove(span)
            return spans

    def _remove(self, span: Span) -> None:
        del self._in_order[span]
        self._by_name[span.name].remove(span)
        self._bytes -= span.end - span.begin


@dataclass(frozen=True)
class CacheLimits:
    """Space that a cache may use."""

    size: int
    """Size of all spans in bytes."""
    reserve: int
    """Free bytes that stay on the disk."""


class SpanCache:
    """Spans as files of a folder that processes and corpora share, under one size limit.

    A cache may fail, and its files may be damaged: it then holds less, and the span is fetched again. A full disk makes
    it remove the least recently used spans.

    Args:
        folder: folder of the cache, for all corpora.
        limits: space that it may use.
        digest: digest of the corpus.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limits: CacheLimits, digest: str) -> None:
        self.indexes = folder / "indexes"
        """Folder of the index files of all corpora."""
        self._spans = folder / "spans"
        self._own = self._spans / digest
        self._total = folder / "spans.total"  # total size in bytes; its lock protects the eviction
        self._limits = limits
        self._warned = False
        self._own.mkdir(parents=True, exist_ok=True)
        remove_partial_files(self._own)

    def read(self, key: str) -> bytes | None:
        """Return a span; None if the cache does not have it."""
        path = self._own / key
        try:
            content = path.read_bytes()
            os.utime(path)  # the time of the last use
        except OSError:
            return None
        return content

    def write(self, key: str, content: bytes) -> None:
        """Store a span, and remove others if the limits require it. Log the first failure."""
        try:
            if not self._make_room(len(content)):
                self._warn(f"its disk has less than {self._limits.reserve:,} bytes free, or its limit is too small")
                return
            try:
                self._write(key, content)
            except OSError as error:
                if error.errno not in FULL_ERRNOS:
                    raise
                self._free(len(content))  # a quota, or another process that fills the disk
                self._write(key, content)
        except OSError as error:
            self._warn(str(error))

    def has_room(self, size: int) -> bool:
        """Return whether the disk has room for a file and the spans. Remove spans if that makes room. Log a lack."""
        with lock_content(self._total) as file:
            lacking = self._limits.reserve + size - self._free_bytes()
            if lacking > 0:
                _note(file, self._evict(self._size() - lacking))
            has_room = self._free_bytes() >= self._limits.reserve + size
        if not has_room:
            self._warn(f"its disk has less than {self._limits.reserve:,} bytes free")
        return has_room

    def _write(self, key: str, content: bytes) -> None:
        staging = self._own / f"{key}.{os.getpid()}-{threading.get_ident()}{PARTIAL}"
        try:
            staging.write_bytes(content)
            staging.replace(self._own / key)
        except OSError:
            with contextlib.suppress(OSError):
                staging.unlink(missing_ok=True)
            raise

    def remove(self, key: str) -> None:
        """Remove a span, if the cache has it. Log the first failure."""
        try:
            (self._own / key).unlink(missing_ok=True)
        except OSError as error:
            self._warn(str(error))

    def _warn(self, reason: str) -> None:
        if not self._warned:
            log.warning("the cache %s cannot be written: %s", self._own, reason)
        self._warned = True

    def _make_room(self, size: int) -> bool:
        """Count a span that is to be written, and remove others; return whether there is room for it."""
        if size > self._limits.size:
            return False
        with lock_content(self._total) as file:
            # A writer that dies after this has counted bytes that it never wrote; the next eviction counts the files.
            noted = os.pread(file, 32, 0)
            total = int(noted) if noted.isdigit() else self._limits.size
            lacking = self._limits.reserve + size - self._free_bytes()
            if total + size > self._limits.size or lacking > 0:
                total = self._evict(int(min(0.9 * self._limits.size - size, 0.9 * (total - max(0, lacking)))))
            has_room = total + size <= self._limits.size and self._free_bytes() >= self._limits.reserve + size
            _note(file, total + size if has_room else total)
        return has_room

    def _free(self, size: int) -> None:
        """Remove the least recently used spans, to free some bytes of a full disk."""
        with lock_content(self._total) as file:
            _note(file, self._evict(max(0, self._size() - 2 * size)) + size)

    def _free_bytes(self) -> int:
        status = os.statvfs(self._spans)
        return status.f_bavail * status.f_frsize

    def _size(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[int, int, Path]]:
        """Return the time of the last use, the size and the path of every file, the least recently used first."""
        files = []
        for path in self._spans.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            files.append((status.st_mtime_ns, status.st_size, path))
        return sorted(files)

    def _evict(self, limit: int) -> int:
        """Remove the least recently used files until at most `limit` bytes are left; return how many are left."""
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= max(0, limit):
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _note(file: int, total: int) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, str(total).encode(), 0)


def remove_partial_files(folder: Path) -> None:
    """Remove the files that killed processes of this machine were writing to a folder of a cache."""
    for path in folder.glob(f"*{PARTIAL}"):
        writer = path.name.removesuffix(PARTIAL).rpartition(".")[2].partition("-")[0]
        if not (writer.isdigit() and _is_alive(int(writer))):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True
