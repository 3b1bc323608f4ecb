"""Listing of the files of the sources, in an order that never changes.

folder, file, s3://bucket/prefix, https://… ─▶ list_files ─▶ SourceFile | Skipped, …
"""

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from data_pipeline.errors import CorpusError
from data_pipeline.sources.gitignore import RuleFile, is_ignored, parse_rules
from data_pipeline.sources.opening import in_a_line, open_file
from data_pipeline.sources.roots import Entry, Root, roots_of
from data_pipeline.sources.source_file import Skipped, SourceFile


@dataclass(frozen=True)
class Selection:
    """Choice of files in the sources."""

    include: Sequence[str] = ()
    """Glob patterns. If there are any, only files whose name or path from the source matches one are listed."""
    exclude: Sequence[str] = ()
    """Glob patterns. A file or folder whose name or path from the source matches one is left out."""
    gitignore: bool = False
    """Leave out what git ignores: .git, and what the .gitignore files of a folder and of those above it name."""


def list_files(sources: Sequence[str], selection: Selection) -> Iterator[SourceFile | Skipped]:
    """Return an iterator over the files of the sources, in the order of the sources, sorted by key within each.

    The iterator is lazy and holds the entries of one folder, and of those above it, in memory. Links to files are
    followed, links to folders are not. Files that the selection leaves out are not reported.

    Raises:
        CorpusError: at once, if a source does not exist, or two have one name or overlap; while listing, if a folder
            cannot be listed.
    """
    return files_of(roots_of(sources), selection)


def files_of(roots: Sequence[Root], selection: Selection) -> Iterator[SourceFile | Skipped]:
    """Return an iterator over the files of roots. See `list_files`."""
    return (_listed(root.number, key, entry) for root in roots for key, entry in _entries_of(root, selection))


def _listed(source: int, key: str, entry: Entry) -> SourceFile | Skipped:
    if entry.problem:
        return Skipped(key, entry.problem, f"{entry.url}: {entry.detail}")
    if entry.size == 0:
        return Skipped(key, "empty", f"{entry.url}: empty")
    return SourceFile(source, entry.url, key, entry.size, entry.version)


def _entries_of(root: Root, selection: Selection) -> Iterator[tuple[str, Entry]]:
    """Yield the selected files of a source, by key."""
    if root.entry.is_folder:
        for path, entry in _walk(root, selection):
            yield (f"{root.name}/{path}" if root.name else path), entry
    elif not selection.include or _matcher(tuple(selection.include))(root.name):
        yield root.name, root.entry


def _walk(root: Root, selection: Selection) -> Iterator[tuple[str, Entry]]:
    """Yield the selected files of a folder and of the folders in it, sorted by their paths from the source."""
    under_way = [_chosen(root, root.entry.url, "", selection, root.rules)]
    while under_way:  # a stack: nested generators would pass each file through every level
        for path, entry, rules in under_way[-1]:
            if entry.is_folder:
                under_way.append(_chosen(root, entry.url, f"{path}/", selection, rules))
                break
            yield path, entry
        else:
            under_way.pop()


def _chosen(
    root: Root, folder: str, below: str, selection: Selection, rules: tuple[RuleFile, ...]
) -> Iterator[tuple[str, Entry, tuple[RuleFile, ...]]]:
    """Yield the selected entries of a folder in order, by path from the source, with the rules that hold there.

    Args:
        root: the source.
        folder: path or URL of the folder.
        below: the folder's path from the source, with a '/' at its end unless it is empty.
        selection: which entries are selected.
        rules: rules of the folders above.
    """
    try:
        # A folder sorts as its files do, whose paths have a '/' after its name.
        found = sorted(root.entries(folder), key=lambda entry: entry.name + "/" * entry.is_folder)
    except Exception as error:
        raise CorpusError(f"cannot list {folder}: {in_a_line(error)}") from error
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
    """Return a function whose result is true for names that match one of the glob patterns."""
    return re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)").match
