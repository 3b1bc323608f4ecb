"""Spans of remote files, kept in memory and on the local disk.

A span is a range of a file that one request fetches: the blocks that are read next.
"""

import logging
import os
import threading
from collections import OrderedDict, defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from byteloom.core.locks import lock_content

log = logging.getLogger(__name__)


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
        """Name of the span in a cache."""
        return f"{self.name}.{self.begin}-{self.end}"


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


class SpanCache:
    """Spans as files of a folder that processes and corpora share, under one size limit.

    A cache may fail, and its files may be damaged: it then holds less, and the span is fetched again.

    Args:
        folder: folder of the cache, for all corpora.
        limit: size of all spans in bytes.
        digest: digest of the corpus.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int, digest: str) -> None:
        self.indexes = folder / "indexes"
        """Folder of the index files of all corpora."""
        self._spans = folder / "spans"
        self._own = self._spans / digest
        self._total = folder / "spans.total"  # total size in bytes; its lock protects the eviction
        self._limit = limit
        self._warned = False
        self._own.mkdir(parents=True, exist_ok=True)

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
        """Store a span, and evict others if the limit requires it. Log the first failure."""
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
        """Remove a span, if the cache has it. Log the first failure."""
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
            # A writer that dies after this has counted bytes that it never wrote; the next eviction counts the files.
            noted = os.pread(file, 32, 0)
            total = int(noted) if noted.isdigit() else self._limit
            if total + size > self._limit:
                total = self._evict(max(0, int(0.9 * self._limit) - size))
            os.ftruncate(file, 0)
            os.pwrite(file, str(total + size).encode(), 0)

    def _evict(self, limit: int) -> int:
        """Remove the least recently used files until at most `limit` bytes are left; return how many are left."""
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
