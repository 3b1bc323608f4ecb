"""Layout: the number of shards, and the range of hashes of each.

    units/*/unit.json ─▶ make_layout ─▶ layout.json, runs.npy, cuts.npy

It is made when all units are done. The bytes of every document that was read are known then, and the limits too.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from byteloom.core.storage.files import replace_file, sync
from byteloom.core.text import count
from data_pipeline.errors import CorpusError
from data_pipeline.preparation.limits import Room, SourceLimit
from data_pipeline.preparation.plan import Plan, read_array, read_progress, read_skipped
from data_pipeline.preparation.report import why_nothing_is_left
from data_pipeline.preparation.spill import RUN, RunFile, read_unit, unit_folder

HASHES = 1 << 64
EVERYTHING = (1 << 63) - 1


class EmptyCorpusError(CorpusError):
    """The corpus would be empty. A restart would not change that."""


@dataclass(frozen=True)
class _StoredLayout:
    shards: list[int]
    bytes: list[int]
    left_out: list[dict[str, int]]


@dataclass(frozen=True)
class Layout:
    """Number of shards of each part, and the documents that the limits let through."""

    folder: Path
    """OUT.partial"""
    shards: list[int]
    """Number of shards of each part."""
    bytes: list[int]
    """Approximate raw bytes of each part."""
    left_out: list[dict[str, int]]
    """Documents of each source that were left out before the gathering, by reason."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the layout of OUT.partial.

        Raises:
            StateFileError: the layout is missing, cannot be read, or is damaged.
        """
        stored = read_progress(folder, "layout.json", _StoredLayout)
        return cls(folder, stored.shards, stored.bytes, stored.left_out)

    @cached_property
    def runs(self) -> NDArray[np.void]:
        """(RUN) runs that the limits let through, in the order of the sources."""
        return read_array(self.folder, "runs.npy")

    @cached_property
    def cuts(self) -> NDArray[np.int64]:
        """(units,) documents that the limits let through; EVERYTHING if there is no limit."""
        return read_array(self.folder, "cuts.npy")

    def shard(self, job: int) -> tuple[int, int]:
        """Return the part of a shard and its number there, given its number among all."""
        part = int(job >= self.shards[0])
        return part, job - part * self.shards[0]

    def hashes(self, part: int, number: int) -> tuple[int, int]:
        """Return the first and the last hash of a shard."""
        shards = self.shards[part]
        return -(-HASHES * number // shards), -(-HASHES * (number + 1) // shards) - 1


def make_layout(plan: Plan) -> None:
    """Write the layout of scattered units. Memory: RUN.itemsize bytes a run.

    Raises:
        EmptyCorpusError: there is no document for a part.
    """
    options = plan.options
    parts = len(options.parts)
    documents, size = np.zeros(parts, np.int64), np.zeros(parts, np.float64)
    left_out = [Counter[str](source["left_out"]) for source in plan.sources]
    limits = [SourceLimit(options) for _ in plan.sources]
    runs = list[tuple[Any, ...]]()
    cuts = np.full(len(plan.units), EVERYTHING, np.int64)
    for unit, planned in enumerate(plan.units):
        counts = read_unit(plan.folder, unit)
        if counts is None:
            raise CorpusError(f"{plan.folder} has lost unit {unit}; remove the folder and start again")
        source, limit = int(planned["source"]), limits[int(planned["source"])]
        room, was_reached = limit.room, limit.reached
        limit.take(counts)
        share = 1.0
        if limit.reached:
            cuts[unit] = 0 if was_reached else _taken(plan.folder, unit, counts, room)
            share = float(cuts[unit] / max(counts["documents"], 1))
            _count_cut_unit(plan, unit, counts, int(cuts[unit]), left_out[source])
        else:
            left_out[source].update(counts["left_out"])
        documents += np.ceil(np.multiply(share, counts["part_documents"])).astype(np.int64)
        size += np.multiply(share, counts["part_bytes"])
        if share:
            max_ordinal, max_end = _bounds(room)
            for number, run in enumerate(counts["runs"]):
                each = (*run["documents"], 0)[:2]
                runs.append((unit, number, run["columns"], each, max_ordinal, max_end))
    _refuse_empty(plan, documents)
    shards = [max(1, round(total / options.shard_bytes)) for total in size]
    np.save(plan.folder / "runs.npy", np.array(runs, RUN))
    np.save(plan.folder / "cuts.npy", cuts)
    for name in ("runs.npy", "cuts.npy"):
        sync(plan.folder / name)
    tree = {"shards": shards, "bytes": [int(total) for total in size], "left_out": left_out}
    replace_file(plan.folder / "layout.json", json.dumps(tree))


def _bounds(room: Room) -> tuple[int, int]:
    """Return the greatest ordinal and end of a record for which there is room."""
    return (
        EVERYTHING if room.documents is None else room.documents - 1,
        EVERYTHING if room.bytes is None else room.bytes,
    )


def _taken(folder: Path, unit: int, counts: dict[str, Any], room: Room) -> int:
    """Return how many documents of a unit are within the limit that is reached in it."""
    max_ordinal, max_end = _bounds(room)
    taken = 0
    for number, run in enumerate(counts["runs"]):
        with RunFile(unit_folder(folder, unit), number, sum(run["documents"]), run["columns"]) as file:
            taken += int(((file.ordinals <= max_ordinal) & (file.ends <= max_end)).sum())
    return taken


def _count_cut_unit(plan: Plan, unit: int, counts: dict[str, Any], cut: int, left_out: Counter[str]) -> None:
    """Count what is left out of a unit with or after the limit: documents before it, and files not begun before it."""
    left_out["over the limit"] += int(plan.units[unit]["files"]) - sum(start < cut for start in counts["starts"])
    skipped = unit_folder(plan.folder, unit) / "skipped.jsonl"
    for line in read_skipped(skipped, plan.folder):
        left_out[line["reason"]] += line["ordinal"] < cut


def _refuse_empty(plan: Plan, documents: NDArray[np.int64]) -> None:
    if not documents.any():
        searched = ", ".join(source["name"] for source in plan.sources)
        folders = (unit_folder(plan.folder, unit) for unit in range(len(plan.units)))
        skipped = (plan.folder / "listed.jsonl", *(path / "skipped.jsonl" for path in folders))
        raise EmptyCorpusError(
            f"the corpus is empty: no document under {searched} has a byte{why_nothing_is_left(skipped)}"
        )
    for part, number in zip(plan.options.parts, documents, strict=True):
        if not number:
            raise EmptyCorpusError(
                f"--holdout {plan.options.holdout} leaves no document for {part}: "
                f"the sources have {count(int(documents.sum()), 'document')}; "
                "add documents, or set another share or --seed"
            )
