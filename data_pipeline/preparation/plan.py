"""Plan of a preparation: the work to do, written before it begins and never changed.

    OUT.partial/
        lock                        held by the process that plans, lays out or finishes
        plan.json                   PrepareOptions, sources, totals; written last, so the plan is complete or absent
        files.jsonl                 every file to read: url, key, size, whether it is a container, version (modification
                                    time or ETag); a line holds up to LINE_FILES files of one unit
        units.npy                   (UNIT) which of those lines belong to each unit of work
        listed.jsonl                files that the listing left out
        …                           see spill.py and prepare.py

A unit is a group of neighbouring files of one source, of about UNIT_BYTES. The corpus depends only on the sources and
the options, not on the number of workers that share the units.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from byteloom.core.faults import hide_queries
from byteloom.core.provenance import changes, flatten
from byteloom.core.storage.files import replace_file, sync
from byteloom.core.storage.state_files import StateFileError, read_json, read_lines
from byteloom.core.text import count
from data_pipeline.errors import CorpusError
from data_pipeline.preparation.keys import FileKeys
from data_pipeline.preparation.report import why_nothing_is_left
from data_pipeline.readers import ReadOptions, is_container
from data_pipeline.sources.listing import Selection, files_of
from data_pipeline.sources.roots import Root, expand, is_pipe, roots_of
from data_pipeline.sources.source_file import Skipped, SourceFile

T = TypeVar("T")

logger = logging.getLogger(__name__)

PLAN_FORMAT = 2
"""Version of the files in OUT.partial."""

UNIT_BYTES = 64 << 20
"""Approximate file bytes of a unit; a larger file is a unit by itself."""
UNIT_FILES = 100_000
"""Largest number of files of a unit, for files that are small or of unknown size."""
LINE_FILES = 1_000
"""Largest number of files of a line of files.jsonl. A line for each file would take three times as long."""
MAX_BLOCK_BYTES = 1 << 30

BAD_REASONS = ("unreadable", "damaged", "no field", "changed")
"""Reasons that end the work, unless PrepareOptions.skip_bad is set."""

UNIT = np.dtype(
    [
        ("offset", "<u8"),  # offset of its first line in files.jsonl
        ("files", "<u4"),
        ("source", "<u4"),
        ("bytes", "<u8"),  # file bytes that its scattering reads; 0 if no file is opened before the gathering
    ]
)


@dataclass(frozen=True)
class PrepareOptions:
    """Options of a preparation.

    Raises:
        CorpusError: a value makes no sense.
    """

    selection: Selection = field(default_factory=Selection)
    """Choice of files in the sources."""
    reading: ReadOptions = field(default_factory=ReadOptions)
    """Readers of the files, and their options."""
    holdout: float = 0.0
    """Share of the documents, chosen by hash, that is written to OUT/validation; the rest is written to OUT/train. With
    0 the whole corpus is written to OUT itself."""
    deduplicate: bool = False
    """Keep only the first, in the order of the listing, of documents with the same bytes. The content then decides the
    split into train and validation, so that no copy is on both sides, in any corpus prepared with this seed."""
    max_documents: int | None = None
    """Largest number of documents of each source: the first in the order of the listing, before copies are removed."""
    max_bytes: int | None = None
    """Largest number of raw bytes of each source: its documents up to the first that does not fit."""
    seed: int = 0
    """Seed of the order of documents and of the choice of the held-out ones."""
    block_bytes: int = 1 << 20
    """Largest size of a block in raw bytes."""
    shard_bytes: int = 512 << 20
    """Approximate size of a shard in raw bytes."""
    level: int = 3
    """zstd compression level."""
    skip_bad: bool = False
    """Leave out documents that cannot be read, and report them, instead of stopping. A restart may change it."""

    def __post_init__(self) -> None:
        if not 0 <= self.holdout < 1:
            raise CorpusError(f"--holdout is {self.holdout}; it must be a share, at least 0 and less than 1")
        if not 1 <= self.block_bytes <= MAX_BLOCK_BYTES:
            raise CorpusError(f"--block-bytes is {self.block_bytes:,}; it must be between 1 and {MAX_BLOCK_BYTES:,}")
        for name in ("shard_bytes", "max_documents", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CorpusError(f"--{name.replace('_', '-')} is {value:,}; it must be at least 1")

    @property
    def parts(self) -> tuple[str, ...]:
        """Folders of OUT that become a corpus each."""
        return ("train", "validation") if self.holdout else ("",)

    @property
    def limited(self) -> bool:
        """Whether a limit on documents or bytes is set."""
        return self.max_documents is not None or self.max_bytes is not None

    @property
    def reads_first(self) -> bool:
        """Whether single documents are read once before they are packed, to know their digest or size."""
        return self.deduplicate or self.limited


def identity(sources: Sequence[str], options: PrepareOptions) -> dict[str, Any]:
    """Return what a corpus depends on, besides the content of the sources, as JSON values."""
    flat = asdict(options)
    del flat["skip_bad"]
    if flat["reading"]["kinds"] is None:  # corpora of earlier versions do not state it
        del flat["reading"]["kinds"]
    relative = any("://" not in source and not Path(source).is_absolute() for source in sources)
    folder = str(Path.cwd()) if relative else None
    tree: dict[str, Any] = json.loads(json.dumps({"sources": list(sources), "folder": folder, "options": flat}))
    return tree


def difference(planned: dict[str, Any], asked: dict[str, Any]) -> str:
    """Return what differs between two identities, such as 'shard_bytes: 512 -> 256, …'; empty if they are equal."""
    now = flatten(asked)
    before = {name: value for name, value in flatten(planned).items() if name in now}
    parts = (change.partition(":") for change in changes(before, now))
    return ", ".join(f"{name.rpartition('.')[2]}:{values}" for name, _, values in parts)


@dataclass(frozen=True)
class _StoredIdentity:
    sources: list[str]
    folder: str | None
    options: dict[str, Any]


@dataclass(frozen=True)
class _StoredPlan:
    identity: _StoredIdentity
    sources: list[dict[str, Any]]
    format: int = 1


@dataclass(frozen=True)
class Plan:
    """Plan of a preparation, read from OUT.partial."""

    folder: Path
    """Folder OUT.partial."""
    identity: dict[str, Any]
    """Sources and options that decide the corpus; see `identity`."""
    options: PrepareOptions
    """Options of the preparation."""
    sources: list[dict[str, Any]]
    """Name, number of files, file bytes, skipped files by reason, and digest of the listing, for each source."""

    @classmethod
    def load(cls, folder: Path, skip_bad: bool) -> Self:
        """Return the plan of OUT.partial.

        Args:
            folder: OUT.partial
            skip_bad: see PrepareOptions; the plan does not store it.

        Raises:
            StateFileError: the plan is missing, cannot be read, or is damaged.
        """
        stored = read_progress(folder, "plan.json", _StoredPlan)
        if stored.format != PLAN_FORMAT:
            raise StateFileError(f"{folder / 'plan.json'} is of another version of byteloom; {begin_again(folder)}")
        options: dict[str, Any] = dict(stored.identity.options, skip_bad=skip_bad)
        try:
            options["selection"] = Selection(**options["selection"])
            reading: dict[str, Any] = options["reading"]
            reading |= {name: tuple(reading[name]) for name in ("members", "kinds") if reading.get(name)}
            options["reading"] = ReadOptions(**reading)
            planned = PrepareOptions(**options)
        except (KeyError, TypeError) as error:
            raise StateFileError.damaged(
                folder / "plan.json", f"its options are not those of this version ({error})", begin_again(folder)
            ) from error
        return cls(folder, asdict(stored.identity), planned, stored.sources)

    @cached_property
    def units(self) -> NDArray[np.void]:
        """(UNIT) units of work."""
        return read_array(self.folder, "units.npy")

    @cached_property
    def _commands(self) -> frozenset[str]:
        """Commands that the user wrote as sources; no other may run."""
        return frozenset(each for source in self.identity["sources"] for each in expand(source) if is_pipe(each))

    def files_of(self, unit: int) -> Iterator[tuple[SourceFile, bool]]:
        """Yield the files of a unit, and whether each is a container.

        Raises:
            StateFileError: files.jsonl is damaged.
        """
        source, left = int(self.units[unit]["source"]), int(self.units[unit]["files"])
        with (self.folder / "files.jsonl").open("rb") as lines:
            lines.seek(int(self.units[unit]["offset"]))
            while left:
                try:
                    rows = json.loads(lines.readline())
                    files = [
                        (SourceFile(source, url, key, size, version), contains)
                        for url, key, size, contains, version in rows
                    ]
                    if any(is_pipe(file.url) and file.url not in self._commands for file, _ in files):
                        raise ValueError("it has a command that is not a source")
                except (ValueError, TypeError) as error:
                    raise StateFileError.damaged(lines.name, str(error), begin_again(self.folder)) from error
                left -= len(files)
                yield from files


def make_plan(
    folder: Path,
    sources: Sequence[str],
    options: PrepareOptions,
    progress: Callable[[int], None],
    own: Sequence[Path] = (),
) -> None:
    """List the sources and write the plan. Memory: UNIT.itemsize bytes a unit.

    Args:
        folder: OUT.partial
        sources: the sources, as the user wrote them.
        options: options of the preparation.
        progress: called at the end of each unit with the bytes of all files listed so far.
        own: folders that do not belong to the sources.

    Raises:
        CorpusError: a source is missing, a file is unreadable (unless `skip_bad`), or there is nothing to read.
    """
    roots = roots_of(sources, own)
    names = {root.name: root.number for root in roots}
    keys, name = _file_keys(roots, options.reading), ""
    totals = [_SourceTotals(source) for source in sources]
    with (folder / "files.jsonl").open("wb") as lines, (folder / "listed.jsonl").open("wb") as log:
        units = _UnitLines(lines)
        for found in files_of(roots, options.selection):
            if isinstance(found, Skipped):
                refuse_bad(found, options, folder, begun=False)
                source = names.get(found.key.partition("/")[0], units.source)
                totals[source].left_out[found.reason] += 1
                log.write(skip_line(source, found))
                continue
            if found.key == name:
                continue  # a server may list a file twice
            name = found.key
            if units.ends_before(found):
                units.end()
                progress(sum(total.bytes for total in totals))
            contains = is_container(found, options.reading)
            key = keys.key_of(name, contains)
            listed = found if key == name else found._replace(key=key)
            units.add(listed, contains, is_read=contains or options.reads_first)
            totals[found.source].add(found, renamed=key != name)
        if not units.files:
            log.flush()
            why = why_nothing_is_left([folder / "listed.jsonl"])
            raise CorpusError(f"the corpus is empty: there is no file to read under {', '.join(sources)}{why}")
        units.end()
    progress(sum(total.bytes for total in totals))
    np.save(folder / "units.npy", np.array(units.rows, UNIT))
    for file in ("files.jsonl", "listed.jsonl", "units.npy"):
        sync(folder / file)
    if renamed := sum(total.renamed for total in totals):
        logger.warning("%s named like a document of another file: #file was added to the key", count(renamed, "file"))
    tree = {"format": PLAN_FORMAT, "identity": identity(sources, options), "sources": [t.as_json() for t in totals]}
    replace_file(folder / "plan.json", json.dumps(tree, indent=1))


class _SourceTotals:
    """Totals of the files of one source."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.files = self.bytes = self.renamed = 0
        self.left_out = Counter[str]()
        self._listing = sha256()

    def add(self, file: SourceFile, renamed: bool) -> None:
        """Count a file, as it was listed."""
        self.files += 1
        self.bytes += file.size or 0
        self.renamed += renamed
        self._listing.update(file.identity)

    def as_json(self) -> dict[str, Any]:
        """Return the totals, with the digest of the listing."""
        totals = {"name": self.name, "files": self.files, "bytes": self.bytes, "left_out": self.left_out}
        return {**totals, "listing_sha256": self._listing.hexdigest()}


class _UnitLines:
    """Writer of files.jsonl, which groups files into units."""

    def __init__(self, lines: BinaryIO) -> None:
        self._lines = lines
        self.rows = list[tuple[int, int, int, int]]()
        """(UNIT) units so far."""
        self.source = 0
        """Source of the present unit."""
        self._begin(0)

    def _begin(self, offset: int) -> None:
        self._offset, self.files, self._bytes, self._to_read = offset, 0, 0, 0
        self._held = list[tuple[object, ...]]()  # files that are not written yet

    def ends_before(self, file: SourceFile) -> bool:
        """Return whether the present unit ends before a file."""
        is_full = self._bytes + (file.size or 0) > UNIT_BYTES or self.files == UNIT_FILES
        return bool(self.files) and (file.source != self.source or is_full)

    def add(self, file: SourceFile, contains: bool, is_read: bool) -> None:
        """Add a file to the present unit."""
        if len(self._held) == LINE_FILES:
            self._write()
        self._held.append((file.url, file.key, file.size, contains, file.version))
        self.files, self.source = self.files + 1, file.source
        self._bytes += file.size or 0
        self._to_read += is_read * (file.size or 0)

    def end(self) -> None:
        """End the present unit."""
        self._write()
        self.rows.append((self._offset, self.files, self.source, self._to_read))
        self._begin(self._lines.tell())

    def _write(self) -> None:
        self._lines.write(json.dumps(self._held).encode() + b"\n")
        self._held.clear()


def _file_keys(roots: Sequence[Root], reading: ReadOptions) -> FileKeys:
    single = [root for root in roots if not root.entry.is_folder]
    files = (SourceFile(root.number, root.entry.url, root.name, None) for root in single)
    return FileKeys((file.key, is_container(file, reading)) for file in files)


def read_progress(folder: Path, name: str, kind: type[T]) -> T:
    """Return the content of a JSON file of a working folder.

    Args:
        folder: OUT.partial
        name: name of the file in it.
        kind: type of the content.

    Raises:
        StateFileError: the file is missing, cannot be read, or is damaged.
    """
    value = read_json(folder / name, kind, begin_again(folder))
    if value is None:
        raise StateFileError(f"{folder / name} is missing; {begin_again(folder)}")
    return value


def read_array(folder: Path, name: str) -> Any:
    """Return the content of an array file of a working folder. Arguments and errors are those of `read_progress`."""
    try:
        return np.load(folder / name, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise StateFileError.damaged(folder / name, str(error).partition("\n")[0], begin_again(folder)) from error


def read_skipped(path: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a unit's skipped.jsonl; none if there is no such file.

    Args:
        path: the file.
        folder: OUT.partial

    Raises:
        StateFileError: the file cannot be read, or is damaged.
    """
    for line in read_lines(path, dict[str, Any]):
        if line.fault or line.value is None:
            raise StateFileError(f"{line.fault}; {begin_again(folder)}")
        yield line.value


def begin_again(folder: Path) -> str:
    """Return the advice for a damaged working folder, as a clause."""
    return f"remove {folder} and give the same command again, which then begins from the start"


def names_in(folder: Path) -> list[str]:
    """Return the names in a working folder; none if another process has finished and removed it."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def skip_line(source: int, left_out: Skipped, **more: int) -> bytes:
    """Return the line of skipped.jsonl for a document that was left out."""
    entry = {**asdict(left_out), "detail": hide_queries(left_out.detail)}
    return json.dumps({"source": source, **entry, **more}).encode() + b"\n"


def refuse_bad(left_out: Skipped, options: PrepareOptions, folder: Path, begun: bool = True) -> None:
    """End the work if a document cannot be read and `skip_bad` is not set.

    Args:
        left_out: the document.
        options: options of the preparation.
        folder: OUT.partial
        begun: whether there is work with which a restart continues.

    Raises:
        CorpusError: the work ends.
    """
    if left_out.reason not in BAD_REASONS or options.skip_bad:
        return
    name = "" if left_out.key in left_out.detail else f" {left_out.key}:"
    hint = f". {folder} holds the work that is done, and the same command continues" if begun else ""
    detail = hide_queries(left_out.detail)
    raise CorpusError(f"{left_out.reason}:{name} {detail}; --skip-bad skips such documents{hint}")


def remove(folder: Path) -> None:
    """Remove a working folder. The plan is removed first, so that a rest of the folder is not taken for work."""
    (folder / "plan.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
