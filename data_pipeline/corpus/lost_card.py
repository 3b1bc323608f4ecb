"""Find the card of media of a corpus whose manifest cannot be read.

    damaged manifest.json ─┬─▶ digest of the manifest, card ─▶ the card is right if the manifest with it has this digest
    OUT/report.json ───────┘

The tars do not hold the card. A digest proves it, so nothing is guessed from damaged bytes.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byteloom.core.storage.state_files import StateFileError, read_json
from data_pipeline.corpus.manifest import digest_with_card
from data_pipeline.media import CARD_FIELD, MediaCard

REPORT = "report.json"
"""Report of `prepare`, in the folder of the corpus or, for a part of several, in the folder above it."""


@dataclass(frozen=True)
class PartRecord:
    """Record of one corpus in the report of `prepare`."""

    manifest_sha256: str
    """Digest of the manifest."""
    media: dict[str, Any] | None
    """Card of the documents; None if they have none in common."""


@dataclass(frozen=True)
class _StoredCorpora:
    corpora: dict[str, PartRecord]


@dataclass(frozen=True)
class FoundCard:
    """Proven card of a corpus."""

    card: MediaCard | None
    """The card; None if the corpus had none."""
    place: str
    """Name of the file in which it was found."""


def find_card(folder: Path, manifest: dict[str, Any]) -> FoundCard | None:
    """Return the proven card of a corpus; None if it is lost.

    Args:
        folder: folder of the corpus, with the manifest that cannot be read.
        manifest: manifest as it is written again, without a card.
    """
    records = {"manifest.json": list(_in_manifest(folder)), REPORT: list(_in_report(folder))}
    digests = {record.manifest_sha256 for found in records.values() for record in found}
    for place, found in records.items():
        for record in found:
            try:
                card = None if record.media is None else MediaCard.from_json(record.media)
            except ValueError:
                continue
            if digest_with_card(manifest, card) in digests:
                return FoundCard(card, place)
    return None


def _in_manifest(folder: Path) -> Iterator[PartRecord]:
    """Yield what is left of the digest and the card in a damaged manifest."""
    try:
        text = (folder / "manifest.json").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    digest = re.search(r'"manifest_sha256": "([0-9a-f]{64})"', text)
    card = re.search(rf'"{CARD_FIELD}": (\{{[^{{}}]*\}})', text)
    try:
        yield PartRecord(digest[1] if digest else "", json.loads(card[1]) if card else None)
    except ValueError:
        return


def _in_report(folder: Path) -> Iterator[PartRecord]:
    """Yield the records of a corpus in a report of `prepare`. Earlier versions of Byteloom wrote none."""
    for path, part in ((folder / REPORT, ""), (folder.parent / REPORT, folder.name)):
        try:
            report = read_json(path, _StoredCorpora, "")
        except StateFileError:  # of an earlier version, damaged, or a file of another program
            continue
        if report is not None and part in report.corpora:
            yield report.corpora[part]
