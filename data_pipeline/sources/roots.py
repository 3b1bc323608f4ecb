"""Roots: the files and folders that the user has named as sources.

source ─▶ expand ─▶ sources without braces ─▶ root_of ─▶ Root: name, place, and the entries of its folders
"""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from byteloom.core.faults import is_missing
from byteloom.core.packages import MissingPackageError
from byteloom.core.storage.urls import is_url, is_web, join_url, without_query
from data_pipeline.errors import CorpusError
from data_pipeline.sources.gitignore import RuleFile, rules_above
from data_pipeline.sources.hub_cache import cached_snapshot
from data_pipeline.sources.opening import ask, in_a_line, source_file_system
from data_pipeline.sources.source_file import LeftOutError, SourceFile

PIPE = "pipe:"
"""Begins a source that is the standard output of a command, as WebDataset writes it."""
CORPORA = (
    frozenset({"manifest.json", "lengths.npy", "index.npy"}),
    frozenset({"report.json", "skipped.jsonl", "train", "validation"}),
    frozenset({"plan.json", "files.jsonl", "units.npy"}),
)
"""Names in a folder that `prepare` wrote: a corpus, the parts of one, and work in progress."""
VERSIONS = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created", "blob_id")
"""Names under which fsspec's libraries tell the version of a file, the best first."""
READABLE = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


class Entry(NamedTuple):
    """A file or folder in a folder."""

    name: str
    url: str
    is_folder: bool
    size: int | None = None
    """Bytes of a file; None if they are not known."""
    problem: str | None = None
    """One of REASONS if this cannot be a document."""
    detail: str = ""
    """Description of the problem."""
    version: str | None = None
    """Modification time or ETag of a file; None if neither is known."""


class Root(NamedTuple):
    """A file, folder or command that is a source, or one of the sources that a source with braces stands for."""

    number: int
    """Number of the source, counted from 0."""
    source: str
    """The source, with its braces expanded."""
    name: str
    """First part of its files' keys."""
    place: PurePosixPath
    """Absolute place, in a form that shows whether two overlap."""
    entry: Entry
    entries: Callable[[str], list[Entry]]
    """Function that returns the entries of one of its folders."""
    rules: tuple[RuleFile, ...] = ()
    """Rules of the .gitignore files above it."""


def is_pipe(source: str) -> bool:
    """Return whether a source is a command."""
    return source.startswith(PIPE)


def expand(source: str) -> list[str]:
    """Return the sources that a source with braces stands for: `{000..012}.tar`, `{train,test}/a.txt`.

    A source without braces, or an existing file or folder, stands for itself.

    Raises:
        CorpusError: the braces are not balanced.
    """
    if "{" not in source or (not is_url(source) and not is_pipe(source) and Path(source).exists()):
        return [source]
    from braceexpand import braceexpand  # noqa: PLC0415 - few sources have braces

    try:
        found = list(braceexpand(source))
    except ValueError as error:
        raise CorpusError(f"cannot expand the braces of {source}: {error}") from error
    return found if len(found) > 1 else [source]


def roots_of(sources: Sequence[str], own: Sequence[Path] = ()) -> list[Root]:
    """Return the roots of sources, in order.

    Args:
        sources: the sources, as the user wrote them.
        own: folders of this machine that do not belong to the sources, even if they lie in them.

    Raises:
        CorpusError: a source does not exist, is a corpus or one of `own`, or two have one name or overlap.
    """
    hidden = frozenset((status.st_dev, status.st_ino) for path in own if path.exists() for status in [path.stat()])
    roots = [root_of(number, each, hidden) for number, source in enumerate(sources) for each in expand(source)]
    _refuse_overlaps(roots)
    return roots


def root_of(number: int, source: str, hidden: frozenset[tuple[int, int]] = frozenset()) -> Root:
    """Return the root of a source without braces.

    Args:
        number: number of the source.
        source: the source.
        hidden: device and inode of the folders that do not belong to it.

    Raises:
        CorpusError: the source does not exist, cannot be read, is a corpus, or is hidden.
    """
    if is_pipe(source):
        return _pipe_root(number, source)
    if (cached := cached_snapshot(source)) is not None:
        return _local_root(number, str(cached), hidden)._replace(source=source, name=_last_part(source))
    return _remote_root(number, source) if is_url(source) else _local_root(number, source, hidden)


def _pipe_root(number: int, source: str) -> Root:
    name = source.removeprefix(PIPE).strip().replace("%", "%25").replace("/", "%2F")  # a key has '/' between parts
    return Root(number, source, name, PurePosixPath(source), Entry(name, source, is_folder=False), _no_entries)


def _no_entries(folder: str) -> list[Entry]:
    raise AssertionError(f"{folder} is no folder")


def _local_root(number: int, source: str, hidden: frozenset[tuple[int, int]]) -> Root:
    path = Path(source.removeprefix("file://"))
    if not path.exists():
        raise CorpusError(f"no such file or folder: {source}")
    place = path.resolve()
    if path.is_dir():
        status = path.stat()
        if (status.st_dev, status.st_ino) in hidden:
            raise CorpusError(f"{source} is a folder of this preparation, not a source")
        if any(all((path / name).exists() for name in names) for names in CORPORA):
            raise CorpusError(f"{source} is a corpus that byteloom prepare wrote, not a source")
        entry, entries = Entry(place.name, str(path), is_folder=True), partial(_local_entries, hidden)
        return Root(number, source, place.name, PurePosixPath(place), entry, entries, rules_above(place))
    entry = _local_entry(path.name, str(path), False, path.stat)
    return Root(number, source, path.name, PurePosixPath(place), entry, _no_entries)


def _local_entries(hidden: frozenset[tuple[int, int]], folder: str) -> list[Entry]:
    def is_hidden(entry: os.DirEntry[str]) -> bool:
        if not hidden:
            return False
        try:
            if not entry.is_dir():  # most entries, without a call of the system
                return False
            status = entry.stat()
        except OSError:  # `_local_entry` names the fault
            return False
        return (status.st_dev, status.st_ino) in hidden

    with os.scandir(folder) as found:
        return _without_corpora(
            folder,
            [
                _local_entry(entry.name, entry.path, entry.is_symlink(), entry.stat)
                for entry in found
                if not is_hidden(entry)
            ],
        )


def _without_corpora(folder: str, entries: list[Entry]) -> list[Entry]:
    """Return the entries of a folder; if it is a corpus, one that says so, with an empty name."""
    names = {entry.name for entry in entries}
    if any(of_corpus <= names for of_corpus in CORPORA):
        return [Entry("", folder, False, None, "corpus", "a corpus that byteloom prepare wrote, or work in progress")]
    return entries


def _local_entry(name: str, path: str, is_link: bool, status_of: Callable[[], os.stat_result]) -> Entry:
    try:
        status = status_of()
    except OSError as error:
        is_dangling = is_link and error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR)
        return Entry(name, path, False, None, "dangling link" if is_dangling else "unreadable", in_a_line(error))
    if stat.S_ISDIR(status.st_mode):
        if is_link:
            return Entry(name, path, False, None, "link", "a link to a folder, which is not followed")
        return Entry(name, path, is_folder=True)
    if not stat.S_ISREG(status.st_mode):
        return Entry(name, path, False, None, "unreadable", "not a regular file")
    if status.st_mode & READABLE != READABLE and not os.access(path, os.R_OK):
        return Entry(name, path, False, None, "unreadable", "Permission denied")
    return Entry(name, path, False, status.st_size, version=str(status.st_mtime_ns))


def _remote_root(number: int, source: str) -> Root:
    try:
        filesystem, path = source_file_system(source)
        info = ask(source, lambda: filesystem.info(path))
    except FileNotFoundError as error:
        why = f" ({in_a_line(error.__cause__)})" if error.__cause__ else ""
        what = "no such file or folder" if is_missing(error) else "cannot be read"
        raise CorpusError(f"{what}: {without_query(source)}{why}") from error
    except MissingPackageError:
        raise
    except Exception as error:  # each of fsspec's libraries has errors of its own
        raise CorpusError(f"cannot read {without_query(source)}: {in_a_line(error)}") from error

    def entries(folder: str) -> list[Entry]:
        path = filesystem._strip_protocol(folder)
        found = ((_last_part(info["name"]), info) for info in ask(folder, lambda: filesystem.ls(path, detail=True)))
        entries = [
            _remote_entry(name, join_url(folder, name), info)
            for name, info in found
            # An object store may hold an empty object with the folder's own name.
            if info["name"].strip("/") != path.strip("/")
        ]
        return _without_corpora(folder, entries)

    url = source.rstrip("/")
    if is_web(source):
        split = urlsplit(url)
        name = unquote(_last_part(split.path)).replace("/", "%2F") or split.netloc  # a key has '/' between parts
        return Root(number, source, name, PurePosixPath(url), _remote_entry(name, source, info), entries)
    name, place = _last_part(path), PurePosixPath(filesystem.unstrip_protocol(path))
    return Root(number, source, name, place, _remote_entry(name, url, info), entries)


def _remote_entry(name: str, url: str, info: dict[str, Any]) -> Entry:
    if info["type"] in ("file", "directory"):
        return Entry(name, url, info["type"] == "directory", info["size"], version=_version_in(info))
    return Entry(name, url, False, None, "unreadable", f"not a regular file; its type is {info['type']}")


def _version_in(info: dict[str, Any]) -> str | None:
    return next((str(info[name]) for name in VERSIONS if info.get(name) is not None), None)


def refuse_changed(file: SourceFile) -> None:
    """Check that a file is still the one that was listed, by its version.

    Raises:
        LeftOutError: it has changed since, or cannot be looked at.
    """
    if file.version is None:
        return
    try:
        if is_url(file.url):
            filesystem, path = source_file_system(file.url)
            filesystem.invalidate_cache(filesystem._parent(path))
            version = _version_in(filesystem.info(path))
        else:
            version = str(os.stat(file.url).st_mtime_ns)  # noqa: PTH116 - this is called for each file
    except MissingPackageError:
        raise
    except Exception as error:  # each of fsspec's libraries has errors of its own
        raise LeftOutError("unreadable", f"cannot read {file.url}: {in_a_line(error)}") from error
    if version not in (None, file.version):
        raise LeftOutError("changed", f"{file.url} changed since it was listed")


def _last_part(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _refuse_overlaps(roots: Sequence[Root]) -> None:
    """Refuse sources with equal keys, and sources that would be read twice. This lists no folder."""
    names: dict[str, Root] = {}
    places: dict[PurePosixPath, Root] = {}
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
