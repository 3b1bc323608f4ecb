"""Roots: the files and folders that the user has named as sources.

source ─▶ expand ─▶ sources without braces ─▶ root_of ─▶ Root: name, place, and the entries of its folders
"""

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from byteloom.core.packages import MissingPackageError
from byteloom.core.urls import is_url, is_web
from data_pipeline.errors import CorpusError
from data_pipeline.sources.gitignore import RuleFile, rules_above
from data_pipeline.sources.opening import in_a_line, source_file_system

PIPE = "pipe:"
"""Begins a source that is the standard output of a command, as WebDataset writes it."""
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


def roots_of(sources: Sequence[str]) -> list[Root]:
    """Return the roots of sources, in order.

    Raises:
        CorpusError: a source does not exist, or two have one name or overlap.
    """
    roots = [root_of(number, each) for number, source in enumerate(sources) for each in expand(source)]
    _refuse_overlaps(roots)
    return roots


def root_of(number: int, source: str) -> Root:
    """Return the root of a source without braces.

    Raises:
        CorpusError: the source does not exist, or cannot be read.
    """
    if is_pipe(source):
        return _pipe_root(number, source)
    return _remote_root(number, source) if is_url(source) else _local_root(number, source)


def _pipe_root(number: int, source: str) -> Root:
    name = source.removeprefix(PIPE).strip().replace("%", "%25").replace("/", "%2F")  # a key has '/' between parts
    return Root(number, source, name, PurePosixPath(source), Entry(name, source, is_folder=False), _no_entries)


def _no_entries(folder: str) -> list[Entry]:
    raise AssertionError(f"{folder} is no folder")


def _local_root(number: int, source: str) -> Root:
    path = Path(source.removeprefix("file://"))
    if not path.exists():
        raise CorpusError(f"no such file or folder: {source}")
    place = path.resolve()
    if path.is_dir():
        entry = Entry(place.name, str(path), is_folder=True)
        return Root(number, source, place.name, PurePosixPath(place), entry, _local_entries, rules_above(place))
    entry = _local_entry(path.name, str(path), False, path.stat)
    return Root(number, source, path.name, PurePosixPath(place), entry, _local_entries)


def _local_entries(folder: str) -> list[Entry]:
    with os.scandir(folder) as found:
        return [_local_entry(entry.name, entry.path, entry.is_symlink(), entry.stat) for entry in found]


def _local_entry(name: str, path: str, is_link: bool, status_of: Callable[[], os.stat_result]) -> Entry:
    try:
        status = status_of()
    except OSError as error:
        return Entry(name, path, False, None, "unreadable", in_a_line(error))
    if stat.S_ISDIR(status.st_mode):
        if is_link:
            return Entry(name, path, False, None, "link", "a link to a folder, which is not followed")
        return Entry(name, path, is_folder=True)
    if not stat.S_ISREG(status.st_mode):
        return Entry(name, path, False, None, "unreadable", "not a regular file")
    if status.st_mode & READABLE != READABLE and not os.access(path, os.R_OK):
        return Entry(name, path, False, None, "unreadable", "Permission denied")
    return Entry(name, path, False, status.st_size)


def _remote_root(number: int, source: str) -> Root:
    try:
        filesystem, path = source_file_system(source)
        info = filesystem.info(path)
    except FileNotFoundError as error:
        why = f" ({in_a_line(error.__cause__)})" if error.__cause__ else ""
        raise CorpusError(f"no such file or folder: {source}{why}") from error
    except MissingPackageError:
        raise
    except Exception as error:  # each of fsspec's libraries has errors of its own
        raise CorpusError(f"cannot read {source}: {in_a_line(error)}") from error

    def entries(folder: str) -> list[Entry]:
        path = filesystem._strip_protocol(folder)
        found = ((_last_part(info["name"]), info) for info in filesystem.ls(path, detail=True))
        return [
            _remote_entry(name, f"{folder}/{name}", info)
            for name, info in found
            # An object store may hold an empty object with the folder's own name.
            if info["name"].strip("/") != path.strip("/")
        ]

    url = source.rstrip("/")
    if is_web(source):
        split = urlsplit(url)
        name = unquote(_last_part(split.path)) or split.netloc
        return Root(number, source, name, PurePosixPath(url), _remote_entry(name, source, info), entries)
    name, place = _last_part(path), PurePosixPath(filesystem.unstrip_protocol(path))
    return Root(number, source, name, place, _remote_entry(name, url, info), entries)


def _remote_entry(name: str, url: str, info: dict[str, Any]) -> Entry:
    if info["type"] in ("file", "directory"):
        return Entry(name, url, info["type"] == "directory", info["size"])
    return Entry(name, url, False, None, "unreadable", f"not a regular file; its type is {info['type']}")


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
