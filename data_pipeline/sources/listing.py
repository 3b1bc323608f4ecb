"""Sources: the files a corpus is prepared from, on this machine or at a URL, listed in an order that never changes.

    folder, file, s3://bucket/prefix, https://… ─▶ list_files ─▶ SourceFile | Skipped, … ─▶ open_file(url) ─▶ bytes

Where files may be read from a URL, fsspec reads them; its own configuration and the usual environment variables
(AWS_ENDPOINT_URL, FSSPEC_S3_ANON, …) say how.
"""

import fnmatch
import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import unquote, urlsplit

from byteloom.core.packages import MissingPackageError, needed_by
from byteloom.core.urls import file_system
from data_pipeline.errors import BadDocumentError, CorpusError
from data_pipeline.sources.gitignore import RuleFile, is_ignored, parse_rules, rules_above

REASONS = ("empty", "unreadable", "damaged", "binary", "no field", "link", "sparse", "duplicate", "over the limit")
"""Why files and documents are left out, in the words by which they are counted."""

BUFFER_BYTES = 64 << 10
"""Small reads are made of reads of this size; most files are no larger than a few of them."""
READ_AHEAD_BYTES = 8 << 20
"""What one request to an object store asks for."""


class SourceFile(NamedTuple):
    source: int
    """Which of the sources it was found under, counted from 0."""
    url: str
    """A path, or a URL that fsspec opens."""
    key: str
    """Unique among all sources: the source's own name and the path from it, with '/' between parts."""
    size: int | None
    """Bytes as listed; None where a server does not say."""


@dataclass(frozen=True)
class Skipped:
    """A file or document that was left out."""

    key: str
    reason: str
    """One of REASONS, by which they are counted."""
    detail: str
    """What exactly is wrong, for a person."""


class LeftOutError(BadDocumentError):
    """A document that cannot be had, for one of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def skipped(key: str, error: BadDocumentError) -> Skipped:
    """What a document counts as that raised an error when it was read."""
    return Skipped(key, error.reason if isinstance(error, LeftOutError) else "damaged", str(error))


@dataclass(frozen=True)
class Selection:
    """Which files of the sources are taken."""

    include: Sequence[str] = ()
    """Glob patterns; when given, only files whose name or path from the source matches one are taken."""
    exclude: Sequence[str] = ()
    """Glob patterns; a file or folder whose name or path from the source matches one is left out."""
    gitignore: bool = False
    """Leave out what git would: .git, and what the .gitignore files of a folder and of those above it name."""


def list_files(sources: Sequence[str], selection: Selection) -> Iterator[SourceFile | Skipped]:
    """Every file of the sources: lazily, source by source in the order given, sorted by key within each.

    Holds the entries of one folder, and of those above it, in memory. Links to files are followed, links to folders are
    not. What the selection does not take is passed over without a word.

    Raises:
        CorpusError: at once, if a source does not exist, or two have one name or overlap; while listing, if a folder
            cannot be listed.
    """
    roots = [_remote_root(source) if _is_url(source) else _local_root(source) for source in sources]
    _refuse_overlaps(roots)
    return (
        _listed(number, key, entry) for number, root in enumerate(roots) for key, entry in _entries_of(root, selection)
    )


def read_small(file: SourceFile) -> bytes | None:
    """What a small file of this machine holds, in three system calls; None unless it has as many bytes as were listed.

    Opening the file says what is wrong otherwise.
    """
    if file.size is None or _is_url(file.url):
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
    """A file to read from its beginning. One that is not of this machine is streamed, an object store's by range.

    Args:
        buffered: whether small reads are to be cheap; a file of this machine that is read at once is opened faster
            without.
    Raises:
        BadDocumentError: it cannot be opened; reading it raises the same.
    """
    try:
        if not _is_url(url) and not buffered:
            return cast(BinaryIO, _PlainFile(url))
        if not _is_url(url):
            return io.BufferedReader(_Stream(Path(url).open("rb", buffering=0), url, seekable=True), BUFFER_BYTES)
        filesystem, path = _filesystem(url)
        # Range requests are not for every web server; without a block size fsspec makes one request and streams it.
        ahead = {"block_size": 0} if _is_http(url) else {"block_size": READ_AHEAD_BYTES, "cache_type": "readahead"}
        return io.BufferedReader(_Stream(filesystem.open(path, "rb", **ahead), url, not _is_http(url)), BUFFER_BYTES)
    except MissingPackageError:
        raise
    except Exception as error:  # each of fsspec's libraries has errors of its own
        raise LeftOutError("unreadable", f"cannot read {url}: {_in_a_line(error)}") from error


class _PlainFile(io.FileIO):
    """A file of this machine whose every error is said in one line that names it."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except OSError as error:
            raise LeftOutError("unreadable", f"cannot read {self.name}: {_in_a_line(error)}") from error


class _Stream(io.RawIOBase):
    """A file whose every error is said in one line that names it."""

    def __init__(self, file: Any, url: str, seekable: bool) -> None:
        self._file, self._url, self._seekable = file, url, seekable

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)
        except Exception as error:
            raise LeftOutError("unreadable", f"cannot read {self._url}: {_in_a_line(error)}") from error

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


class _Entry(NamedTuple):
    """What a folder holds under one name."""

    name: str
    url: str
    is_folder: bool
    size: int | None = None
    problem: str | None = None
    """One of REASONS if it cannot be a document."""
    detail: str = ""


class _Root(NamedTuple):
    source: str
    name: str
    """First part of its files' keys."""
    place: PurePosixPath
    """Where it is, in a form that tells whether two overlap."""
    entry: _Entry
    entries: Callable[[str], list[_Entry]]
    """What a folder of it holds."""
    rules: tuple[RuleFile, ...] = ()
    """Of the .gitignore files above it."""


def _local_root(source: str) -> _Root:
    path = Path(source.removeprefix("file://"))
    if not path.exists():
        raise CorpusError(f"no such file or folder: {source}")
    place = path.resolve()
    if path.is_dir():
        entry = _Entry(place.name, str(path), is_folder=True)
        return _Root(source, place.name, PurePosixPath(place), entry, _local_entries, rules_above(place))
    entry = _local_entry(path.name, str(path), False, path.stat)
    return _Root(source, path.name, PurePosixPath(place), entry, _local_entries)


def _local_entries(folder: str) -> list[_Entry]:
    with os.scandir(folder) as found:
        return [_local_entry(entry.name, entry.path, entry.is_symlink(), entry.stat) for entry in found]


def _local_entry(name: str, path: str, is_link: bool, status_of: Callable[[], os.stat_result]) -> _Entry:
    try:
        status = status_of()
    except OSError as error:
        return _Entry(name, path, False, None, "unreadable", _in_a_line(error))
    if stat.S_ISDIR(status.st_mode):
        if is_link:
            return _Entry(name, path, False, None, "link", "a link to a folder, which is not followed")
        return _Entry(name, path, is_folder=True)
    if not stat.S_ISREG(status.st_mode):
        return _Entry(name, path, False, None, "unreadable", "not a regular file")
    if status.st_mode & _READABLE != _READABLE and not os.access(path, os.R_OK):
        return _Entry(name, path, False, None, "unreadable", "Permission denied")
    return _Entry(name, path, False, status.st_size)


_READABLE = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


def _remote_root(source: str) -> _Root:
    try:
        filesystem, path = _filesystem(source)
        info = filesystem.info(path)
    except FileNotFoundError as error:
        why = f" ({_in_a_line(error.__cause__)})" if error.__cause__ else ""
        raise CorpusError(f"no such file or folder: {source}{why}") from error
    except MissingPackageError:
        raise
    except Exception as error:  # each of fsspec's libraries has errors of its own
        raise CorpusError(f"cannot read {source}: {_in_a_line(error)}") from error

    def entries(folder: str) -> list[_Entry]:
        path = filesystem._strip_protocol(folder)
        found = ((_last_part(info["name"]), info) for info in filesystem.ls(path, detail=True))
        return [
            _remote_entry(name, f"{folder}/{name}", info)
            for name, info in found
            # An object store may hold an empty object in the folder's own name.
            if info["name"].strip("/") != path.strip("/")
        ]

    url = source.rstrip("/")
    if _is_http(source):
        split = urlsplit(url)
        name = unquote(_last_part(split.path)) or split.netloc
        return _Root(source, name, PurePosixPath(url), _remote_entry(name, source, info), entries)
    name, place = _last_part(path), PurePosixPath(filesystem.unstrip_protocol(path))
    return _Root(source, name, place, _remote_entry(name, url, info), entries)


def _remote_entry(name: str, url: str, info: dict[str, Any]) -> _Entry:
    if info["type"] in ("file", "directory"):
        return _Entry(name, url, info["type"] == "directory", info["size"])
    return _Entry(name, url, False, None, "unreadable", f"not a regular file; its type is {info['type']}")


def _refuse_overlaps(roots: Sequence[_Root]) -> None:
    """Sources apart have keys apart, and no file is read twice; checked without listing one."""
    names: dict[str, _Root] = {}
    places: dict[PurePosixPath, _Root] = {}
    for root in roots:
        if root.place in places:
            raise CorpusError(f"{places[root.place].source} and {root.source} are the same source; name it once")
        if root.name in names:
            raise CorpusError(
                f"{names[root.name].source} and {root.source} have the same name {root.name!r}, so their documents "
                "would have the same keys; prepare them as two corpora, or from a folder that contains both"
            )
        names[root.name] = places[root.place] = root
    for root in roots:
        for above in root.place.parents:
            if above in places and places[above].entry.is_folder:
                raise CorpusError(f"{root.source} is inside {places[above].source}; name only one of them")


def _listed(source: int, key: str, entry: _Entry) -> SourceFile | Skipped:
    if entry.problem:
        return Skipped(key, entry.problem, f"{entry.url}: {entry.detail}")
    if entry.size == 0:
        return Skipped(key, "empty", f"{entry.url}: empty")
    return SourceFile(source, entry.url, key, entry.size)


def _entries_of(root: _Root, selection: Selection) -> Iterator[tuple[str, _Entry]]:
    """The files of a source that the selection takes, by key."""
    if root.entry.is_folder:
        for path, entry in _walk(root, selection):
            yield (f"{root.name}/{path}" if root.name else path), entry
    elif not selection.include or _matcher(tuple(selection.include))(root.name):
        yield root.name, root.entry


def _walk(root: _Root, selection: Selection) -> Iterator[tuple[str, _Entry]]:
    """The files of a folder and its folders that the selection takes, sorted by their paths from the source."""
    under_way = [_chosen(root, root.entry.url, "", selection, root.rules)]
    while under_way:  # a folder and those above it: generators in one another would pass each file through all of them
        for path, entry, rules in under_way[-1]:
            if entry.is_folder:
                under_way.append(_chosen(root, entry.url, f"{path}/", selection, rules))
                break
            yield path, entry
        else:
            under_way.pop()


def _chosen(
    root: _Root, folder: str, below: str, selection: Selection, rules: tuple[RuleFile, ...]
) -> Iterator[tuple[str, _Entry, tuple[RuleFile, ...]]]:
    """What a folder holds that the selection takes, in order, by path from the source; and the rules that hold there.

    Args:
        below: the folder's own path from the source, with a '/' at its end unless it is empty.
    """
    try:
        # A folder sorts as its files do, whose paths have a '/' after its name.
        found = sorted(root.entries(folder), key=lambda entry: entry.name + "/" * entry.is_folder)
    except Exception as error:
        raise CorpusError(f"cannot list {folder}: {_in_a_line(error)}") from error
    if selection.gitignore:
        for entry in found:
            if entry.name == ".gitignore" and not entry.is_folder and not entry.problem:
                with open_file(entry.url) as file:
                    rules += (RuleFile(parse_rules(file.read()), below=tuple(below.split("/")[:-1])),)
    included, excluded = _matcher(tuple(selection.include)), _matcher(tuple(selection.exclude))
    for entry in found:
        name, path = entry.name, below + entry.name
        if excluded(name) or excluded(path):
            continue
        if selection.gitignore and is_ignored(path.split("/"), entry.is_folder, rules):
            continue
        if entry.is_folder or not selection.include or included(name) or included(path):
            yield path, entry, rules


@lru_cache(maxsize=4)
def _matcher(patterns: tuple[str, ...]) -> Callable[[str], object]:
    """What is true of names that match one of the glob patterns."""
    return re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)").match


def _is_url(source: str) -> bool:
    return "://" in source and not source.startswith("file://")


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. fsspec keeps one of each kind."""
    options: dict[str, Any] = {"use_listings_cache": False}  # it would hold every listing in memory
    if _is_http(url):
        with needed_by(url, "aiohttp"):
            from aiohttp import ClientTimeout  # noqa: PLC0415 - a third of a second

        # Bytes as they are stored, not compressed for the way; and no end after five minutes, as is aiohttp's default.
        options["headers"] = {"Accept-Encoding": "identity"}
        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=60, sock_read=300)}
    return file_system(url, **options)


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _in_a_line(error: BaseException) -> str:
    """What the operating system or a library says is wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".partition("\n")[0]
