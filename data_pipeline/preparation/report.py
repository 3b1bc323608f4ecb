"""Counts by suffix for the report of a preparation, with examples of names.

    documents as they are packed ─▶ DocumentKinds ─▶ shards/000012.json ─┐
    skipped.jsonl ─▶ left_out_kinds                                      ├─▶ OUT/report.json, and the printed table

Memory: a few numbers and names for each suffix.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.readers.kinds import suffix_of

EXAMPLES = 3
"""Number of names that stand for the others."""


@dataclass
class DocumentKind:
    """Documents of one suffix and modality."""

    suffix: str
    """Suffix of the keys; empty if they have none."""
    modality: str
    """One of MODALITIES."""
    documents: int = 0
    """Number of documents."""
    raw_bytes: int = 0
    """Bytes of these documents."""
    examples: list[str] = field(default_factory=list)
    """Keys of the first of them."""


@dataclass
class LeftOutKind:
    """Files and documents of one suffix that were left out for one reason."""

    suffix: str
    """Suffix of the keys; empty if they have none."""
    reason: str
    """One of REASONS."""
    documents: int = 0
    """Number of files and documents."""
    examples: list[str] = field(default_factory=list)
    """Keys of the first of them."""


class DocumentKinds:
    """Counter of documents by suffix and modality."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], DocumentKind] = {}

    def add(self, key: str, modality: str, size: int) -> None:
        """Count a document."""
        suffix = suffix_of(key)
        kind = self._kinds.get((suffix, modality))
        if kind is None:
            kind = self._kinds[suffix, modality] = DocumentKind(suffix, modality)
        kind.documents += 1
        kind.raw_bytes += size
        if len(kind.examples) < EXAMPLES:
            kind.examples.append(key)

    def merge(self, others: Iterable[DocumentKind]) -> None:
        """Add the counts of later documents."""
        for other in others:
            kind = self._kinds.setdefault((other.suffix, other.modality), DocumentKind(other.suffix, other.modality))
            kind.documents += other.documents
            kind.raw_bytes += other.raw_bytes
            kind.examples += other.examples[: EXAMPLES - len(kind.examples)]

    def sorted(self) -> list[DocumentKind]:
        """Return the counts, those with most bytes first."""
        return sorted(self._kinds.values(), key=lambda kind: (-kind.raw_bytes, kind.suffix, kind.modality))


def left_out_kinds(skipped: Path) -> list[LeftOutKind]:
    """Return the counts of a skipped.jsonl, those with most documents first."""
    kinds = dict[tuple[str, str], LeftOutKind]()
    for line in _lines(skipped):
        at = suffix_of(line["key"]), line["reason"]
        kind = kinds.setdefault(at, LeftOutKind(*at))
        kind.documents += 1
        if len(kind.examples) < EXAMPLES:
            kind.examples.append(line["key"])
    return sorted(kinds.values(), key=lambda kind: (-kind.documents, kind.reason, kind.suffix))


def why_nothing_is_left(skipped: Iterable[Path]) -> str:
    """Return a clause about all documents that were left out, with the first as an example; "" if there is none."""
    reasons, example = Counter[str](), ""
    for path in skipped:
        for line in _lines(path) if path.exists() else ():
            reasons[line["reason"]] += 1
            name = "" if line["key"] in line["detail"] else f"{line['key']}: "
            example = example or name + line["detail"]
    counts = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
    return f"; left out: {counts}, such as {example}" if example else ""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        yield from map(json.loads, file)
