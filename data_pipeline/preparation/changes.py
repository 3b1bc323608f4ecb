"""Changes of the sources since they were listed for a plan.

files.jsonl ──┐
              ├─▶ SourceChanges: changed, gone, new
list again ───┘
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path

from byteloom.core.text import count
from data_pipeline.errors import CorpusError
from data_pipeline.preparation.plan import Plan
from data_pipeline.sources.listing import Selection, files_of
from data_pipeline.sources.roots import Root, roots_of
from data_pipeline.sources.source_file import SourceFile

EXAMPLES = 3
"""Number of files of each kind that a message names."""


@dataclass
class _Files:
    number: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, file: SourceFile) -> None:
        self.number += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(file.url)

    def described(self, what: str) -> str:
        """Return a clause, such as "2 files changed (a.txt, b.txt)"; empty if there is none."""
        more = ", …" if self.number > len(self.examples) else ""
        return f"{count(self.number, 'file')} {what} ({', '.join(self.examples)}{more})" if self.number else ""


@dataclass
class SourceChanges:
    """Files that are not as they were listed."""

    changed: _Files = field(default_factory=_Files)
    """Files that have another size or version."""
    gone: _Files = field(default_factory=_Files)
    """Files that are not there, or are empty or unreadable."""
    new: _Files = field(default_factory=_Files)
    """Files that were not there."""

    def of_planned(self) -> str:
        """Return a clause about the planned files that are not as they were; empty if all are."""
        clauses = (self.changed.described("changed"), self.gone.described("cannot be found or read"))
        return " and ".join(filter(None, clauses))

    def of_others(self) -> str:
        """Return a clause about the files that are new; empty if there is none."""
        return self.new.described("new")


def changes_since(plan: Plan, own: Sequence[Path]) -> SourceChanges:
    """List the sources of a plan again, and return what has changed. Memory does not depend on the number of files.

    Args:
        plan: the plan.
        own: folders that do not belong to the sources.

    Raises:
        CorpusError: a source does not exist any more.
    """
    roots = roots_of(plan.identity["sources"], own)
    selected = files_of(roots, plan.options.selection)
    listed = (file for unit in range(len(plan.units)) for file, _ in plan.files_of(unit))
    before = _placed(listed, roots)
    after = _placed((file for file in selected if isinstance(file, SourceFile)), roots)
    changes = SourceChanges()
    old, new = next(before, None), next(after, None)
    while old is not None and new is not None:
        if old[0] < new[0]:
            changes.gone.add(old[1])
            old = next(before, None)
        elif new[0] < old[0]:
            changes.new.add(new[1])
            new = next(after, None)
        else:
            if _differ(old[1].size, new[1].size) or _differ(old[1].version, new[1].version):
                changes.changed.add(new[1])
            old, new = next(before, None), next(after, None)
    for rest, first, kind in ((before, old, changes.gone), (after, new, changes.new)):
        for _, file in chain([first] if first else [], rest):
            kind.add(file)
    return changes


def _placed(files: Iterator[SourceFile], roots: Sequence[Root]) -> Iterator[tuple[tuple[int, str], SourceFile]]:
    """Yield files with their places, which grow: the number of the root, and the URL."""
    number = 0
    for file in files:
        while number < len(roots) and not _is_in(file.url, roots[number]):
            number += 1
        yield (number, file.url), file


def _is_in(url: str, root: Root) -> bool:
    return url == root.entry.url or url.startswith(root.entry.url.rstrip("/") + "/")


def _differ(before: object, now: object) -> bool:
    return before is not None and now is not None and before != now


def listing_sha256(source: str, selection: Selection, own: Sequence[Path]) -> str | None:
    """Return the digest of the listing of a source as it is now; None if the source does not exist.

    It is the digest in the plan if no file was added, removed or changed.
    """
    digest, name = sha256(), ""
    try:
        for file in files_of(roots_of([source], own), selection):
            if isinstance(file, SourceFile) and file.key != name:
                name = file.key
                digest.update(file.identity)
    except CorpusError:
        return None
    return digest.hexdigest()
