"""Preparation of a corpus from files of any kind: parallel, restartable at any moment, each document exactly once.

    sources ─▶ plan ─▶ units ─▶ scatter ─▶ runs sorted by hash ─▶ layout ─▶ gather ─▶ shards ─▶ finish ─▶ OUT
               once             a job each                        once      a job each          once

Everything is written in OUT.partial, from which the corpus is renamed to OUT at the end. The output of a step is
complete or absent. After a kill, the same command continues with the steps and jobs that are not done. Workers and
tasks of a scheduler's array share the jobs through that folder, and their number may change. The corpus depends only on
the sources and the options.

Memory of a process does not depend on the size of the corpus or of a document: about 50 MB of libraries, and the larger
of spill.BUFFER_BYTES (scattering) and 40 bytes a document of one shard plus about six blocks (gathering). Listing needs
the entries of one folder. Readers of media state their own memory. Disk space, besides OUT: the raw bytes of documents
from containers, and once more those of the shards that are being gathered.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from byteloom.core.progress import Progress, ignore
from byteloom.core.storage.files import replace_file, sync
from byteloom.core.storage.locks import lock_file
from byteloom.core.storage.state_files import StateFileError, read_json
from data_pipeline.corpus.index import ShardIndex
from data_pipeline.corpus.lost_card import REPORT, PartRecord
from data_pipeline.corpus.manifest import read_manifest, write_index
from data_pipeline.corpus.storage.folder import Folder
from data_pipeline.errors import CorpusError
from data_pipeline.media import CARD_FIELD
from data_pipeline.preparation.changes import changes_since, listing_sha256
from data_pipeline.preparation.gather import Gather, part_folder, read_card, read_counts, read_index
from data_pipeline.preparation.layout import EmptyCorpusError, Layout, make_layout
from data_pipeline.preparation.plan import (
    Plan,
    PrepareOptions,
    difference,
    identity,
    make_plan,
    read_skipped,
    remove,
)
from data_pipeline.preparation.report import (
    DocumentKind,
    DocumentKinds,
    LeftOutKind,
    left_out_kinds,
    why_nothing_is_left,
)
from data_pipeline.preparation.scatter import Scatter
from data_pipeline.preparation.spill import unit_folder
from data_pipeline.preparation.work import Pool

__all__ = ["PrepareOptions", "PrepareReport", "SourceReport", "Task", "prepare", "working_folder"]

logger = logging.getLogger(__name__)

SMALL_BYTES = 32 << 20
"""Smaller sources are prepared by one process, because starting others takes longer. Workers start while larger sources
are listed."""


@dataclass(frozen=True)
class Task:
    """Number of a task in an array. It decides where the task begins; any task can do the work of all.

    Raises:
        CorpusError: there is no such number.
    """

    number: int = 0
    """Number of this task, counted from 0."""
    of: int = 1
    """Number of tasks."""
    merges: bool = True
    """Whether this task completes OUT after the last shard. If not, a later call must."""

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise CorpusError(
                f"--task is {self.number} and --of is {self.of}; --task must be between 0 and {self.of - 1}"
            )


@dataclass
class SourceReport:
    """Counts of one source."""

    name: str
    """The source, as the user wrote it."""
    files: int
    """Number of files."""
    bytes: int
    """Bytes of the files, as listed."""
    documents: int = 0
    """Documents in the corpus."""
    raw_bytes: int = 0
    """Bytes of these documents."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Documents that were left out, by reason (sources.REASONS). Over the limit, files that were not begun count."""
    listing_sha256: str | None = None
    """Digest of the names, sizes and versions of its files; None if an earlier version of Byteloom listed them."""


@dataclass
class _StoredReport:
    sources: list[str]
    folder: str | None
    options: dict[str, Any]
    parts: list[str]
    per_source: list[SourceReport]
    kinds: list[DocumentKind] = field(default_factory=list)
    left_out: list[LeftOutKind] = field(default_factory=list)
    corpora: dict[str, PartRecord] = field(default_factory=dict)


@dataclass
class PrepareReport:
    """Content of OUT/report.json."""

    identity: dict[str, Any]
    """Sources and options."""
    parts: list[str]
    """Folders of OUT that are a corpus each; '' is OUT itself."""
    sources: list[SourceReport]
    """Counts of each source."""
    kinds: list[DocumentKind] = field(default_factory=list)
    """Documents by suffix and modality. A report of an earlier version has none."""
    left_out_kinds: list[LeftOutKind] = field(default_factory=list)
    """Files and documents that were left out, by suffix and reason, without those over the limit."""
    corpora: dict[str, PartRecord] = field(default_factory=dict)
    """Digest and media card of each part. A report of an earlier version has none."""
    was_finished: bool = False
    """Whether the corpus existed before this call."""
    changed: list[str] = field(default_factory=list)
    """Sources that have changed since the corpus was written, for a corpus that existed before this call."""

    @property
    def documents(self) -> int:
        """Documents in the corpus."""
        return sum(source.documents for source in self.sources)

    @property
    def left_out(self) -> int:
        """Documents that were left out."""
        return sum(source.left_out.total() for source in self.sources)

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        totals = {"documents": self.documents, "raw_bytes": sum(source.raw_bytes for source in self.sources)}
        by_suffix = {
            "kinds": [asdict(kind) for kind in self.kinds],
            "left_out": [asdict(kind) for kind in self.left_out_kinds],
        }
        sources = [vars(source) for source in self.sources]
        corpora = {part: asdict(record) for part, record in self.corpora.items()}
        counts = {**totals, "per_source": sources, **by_suffix}
        return {**self.identity, "parts": self.parts, **counts, "corpora": corpora}

    def save(self, path: Path) -> None:
        """Write the report."""
        replace_file(path, json.dumps(self.as_json(), indent=1))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the report of a corpus.

        Raises:
            StateFileError: the report is missing, cannot be read, or is damaged.
        """
        stored = read_json(path, _StoredReport, "restore it, or prepare the corpus again")
        if stored is None:
            raise StateFileError(f"{path} is missing")
        same = {"sources": stored.sources, "folder": stored.folder, "options": stored.options}
        return cls(same, stored.parts, stored.per_source, stored.kinds, stored.left_out, stored.corpora)


def prepare(
    sources: Sequence[str | Path],
    out: Path,
    options: PrepareOptions,
    progress: Progress = ignore,
    workers: int = 1,
    task: Task = Task(),
) -> PrepareReport | None:
    """Write the documents of the sources as a corpus at `out`, which appears when it is complete.

    If work with the same sources and options has begun, this continues it, also while other processes work on it.

    Args:
        sources: files, folders, URLs, or commands.
        out: folder of the corpus.
        options: options of the preparation.
        progress: called with bytes done and in all.
        workers: number of processes that share the work.
        task: number of this call, if an array of calls shares the work.

    Returns:
        The report of the corpus; None if all shards are written and the task does not merge them.

    Raises:
        CorpusError: a source is missing; a document cannot be read; there is no byte to write; `out` exists and is
            another corpus; `out`.partial holds work of other sources or options; or the sources have changed since that
            work began.
    """
    names = [str(source) for source in sources]
    asked = identity(names, options)
    folder = working_folder(out)
    with Pool(folder, options.skip_bad, workers, task.number / task.of, (task.number + 1) / task.of) as pool:

        def listed(size: int) -> None:
            if size >= SMALL_BYTES:
                pool.start()

        with _held(folder, out) as is_open:
            if not is_open:
                report = _finished(out, folder, asked)
                if task.number == 0:
                    report.changed = _changed(report, options, _own_folders(out))
                return report
            plan = _planned(folder, names, options, listed, out, compares=task.number == 0)
        scatter = Scatter(plan)
        total = sum(scatter.sizes) + sum(source["bytes"] for source in plan.sources)
        if not (folder / "layout.json").exists():  # units are not kept until the end
            pool.run(plan, scatter, lambda done: progress(done, total))
        with _held(folder, out) as is_open:
            if not is_open:
                return _finished(out, folder, asked)
            layout = _laid_out(plan)
        gather = Gather(plan, layout)
        total = sum(scatter.sizes) + sum(gather.sizes)
        pool.run(plan, gather, lambda done: progress(sum(scatter.sizes) + done, total))
    if not task.merges:
        return None
    with _held(folder, out) as is_open:
        if not is_open:
            return _finished(out, folder, asked)
        report = _finish(plan, layout, out)
    progress(total, total)
    return report


def working_folder(out: Path) -> Path:
    """Return OUT.partial.

    Raises:
        CorpusError: nothing can be written there, or renamed to OUT.
    """
    if out.is_symlink() and not out.exists():
        raise CorpusError(f"{out} is a link to {out.readlink()}, which does not exist; remove the link")
    if not out.name:
        raise CorpusError(f"{out} is no name of a folder; choose another --out")
    return out.with_name(f"{out.name}.partial")


def _own_folders(out: Path) -> list[Path]:
    """Return the folders that belong to a preparation, and not to its sources."""
    return [out, *(out.with_name(f"{out.name}.{suffix}") for suffix in ("partial", "jobs"))]


@contextmanager
def _held(folder: Path, out: Path) -> Iterator[bool]:
    """Hold the lock of OUT.partial, which is made if needed; yield whether OUT does not exist yet."""
    if out.exists():
        yield False
        return
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CorpusError(f"cannot make the folder {folder}: {error.strerror}") from error
        lock = folder / "lock"
        with ExitStack() as stack:
            try:
                stack.enter_context(lock_file(lock))
            except FileNotFoundError:  # its holder removed the folder: all is finished, or nothing can be begun
                continue
            except OSError as error:
                raise CorpusError(
                    f"{lock} cannot be locked ({error.strerror}); choose a file system with locks for --out"
                ) from error
            yield not out.exists()
            return


def _finished(out: Path, folder: Path, asked: dict[str, Any]) -> PrepareReport:
    """Return the report of an existing corpus.

    Raises:
        CorpusError: it was made from other sources or options.
    """
    try:
        report = PrepareReport.load(out / REPORT)
    except StateFileError:
        report = None
    if report is None or report.identity != asked:
        raise CorpusError(f"{out} exists already; choose another --out, or remove that folder first")
    if folder.exists():
        remove(folder)
    report.was_finished = True
    return report


def _changed(report: PrepareReport, options: PrepareOptions, own: Sequence[Path]) -> list[str]:
    """Return the sources of a corpus that are not as they were when they were listed for it."""
    return [
        source.name
        for source in report.sources
        if source.listing_sha256 not in (None, listing_sha256(source.name, options.selection, own))
    ]


def _planned(
    folder: Path,
    sources: Sequence[str],
    options: PrepareOptions,
    listed: Callable[[int], None],
    out: Path,
    compares: bool,
) -> Plan:
    """Return the existing plan, or a new one. If none can be made, nothing stays on disk.

    Args:
        folder: OUT.partial
        sources: the sources.
        options: options of the preparation.
        listed: called with the bytes of the files, also while they are listed.
        out: OUT
        compares: whether to compare the sources with an existing plan. One task of an array does this; any task
            notices a change of a file that it reads.
    """
    if (folder / "plan.json").exists():
        plan = Plan.load(folder, options.skip_bad)
        if changed := difference(plan.identity, identity(sources, options)):
            raise CorpusError(
                f"{folder} was started with other sources or options ({changed}); "
                "use the same ones, or remove that folder to start again"
            )
        if compares and not _is_read(plan):
            _refuse_changes(plan, _own_folders(out))
        listed(sum(source["bytes"] for source in plan.sources))
        return plan
    try:
        for name in ("units", "shards", *(f"corpus/{part}" for part in options.parts)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        make_plan(folder, sources, options, listed, _own_folders(out))
    except BaseException:
        remove(folder)
        raise
    return Plan.load(folder, options.skip_bad)


def _is_read(plan: Plan) -> bool:
    """Return whether all shards are written, so that no source is read any more."""
    if not (plan.folder / "layout.json").exists():
        return False
    layout = Layout.load(plan.folder)
    return len(Gather(plan, layout).done()) == sum(layout.shards)


def _refuse_changes(plan: Plan, own: Sequence[Path]) -> None:
    """End the work if files have changed since they were listed; with `skip_bad`, those not yet read are left out."""
    changes = changes_since(plan, own)
    if others := changes.of_others():
        logger.warning("%s: not part of the corpus, whose sources were listed before", others)
    if not (changed := changes.of_planned()):
        return
    text = f"since {plan.folder} was begun, {changed}"
    if not plan.options.skip_bad:
        raise CorpusError(
            f"{text}; remove that folder to begin again with the sources as they are now, restore them, or add "
            "--skip-bad to leave out those that were not read yet"
        )
    logger.warning("%s: those that were not read yet are left out", text)


def _laid_out(plan: Plan) -> Layout:
    if not (plan.folder / "plan.json").exists():
        raise CorpusError(f"{plan.folder} was removed while this command was working in it; start again")
    if not (plan.folder / "layout.json").exists():
        try:
            make_layout(plan)
        except EmptyCorpusError:
            remove(plan.folder)
            raise
    return Layout.load(plan.folder)


def _finish(plan: Plan, layout: Layout, out: Path) -> PrepareReport:
    """Write index and reports, and rename the corpus to OUT. After a kill, this can be done again."""
    if not (plan.folder / "layout.json").exists():
        raise CorpusError(f"{plan.folder} was removed while this command was working in it; start again")
    corpus = plan.folder / "corpus"
    if not (corpus / REPORT).exists():
        _write_indexes(plan, layout)
        _write_skipped(plan, layout, corpus / "skipped.jsonl")
        _report(plan, layout).save(corpus / REPORT)
    # Remove large files before the rename, so that a kill cannot leave them next to a finished corpus.
    for name in ("units", "work"):
        shutil.rmtree(plan.folder / name, ignore_errors=True)
    corpus.rename(out)
    sync(out.parent)
    remove(plan.folder)
    return PrepareReport.load(out / REPORT)


def _write_indexes(plan: Plan, layout: Layout) -> None:
    for part, count in enumerate(layout.shards):
        before = sum(layout.shards[:part])

        def indexes(jobs: range) -> Iterator[ShardIndex]:
            for job in jobs:
                if (index := read_index(plan.folder, job)) is not None:
                    yield index

        jobs = range(before, before + count)
        try:
            write_index(part_folder(plan, part), indexes(jobs), read_card(plan.folder, jobs))
        except CorpusError as error:
            why = why_nothing_is_left(plan.folder / "shards" / f"{job:06d}.skipped.jsonl" for job in jobs)
            remove(plan.folder)
            raise CorpusError(f"{error}{why}") from error


def _write_skipped(plan: Plan, layout: Layout, path: Path) -> None:
    """Write the list of everything that was left out; documents beyond a limit are only counted."""
    with path.open("wb") as out:
        _append(plan.folder / "listed.jsonl", out)
        for unit, cut in enumerate(layout.cuts.tolist()):
            own = unit_folder(plan.folder, unit) / "skipped.jsonl"
            if not plan.options.limited:
                _append(own, out)
            else:
                for line in read_skipped(own, plan.folder):
                    if line.pop("ordinal") < cut:
                        out.write(json.dumps(line).encode() + b"\n")
        for job in range(sum(layout.shards)):
            _append(plan.folder / "shards" / f"{job:06d}.skipped.jsonl", out)
    sync(path)


def _append(path: Path, out: BinaryIO) -> None:
    if path.exists():
        with path.open("rb") as file:
            shutil.copyfileobj(file, out)


def _report(plan: Plan, layout: Layout) -> PrepareReport:
    sources = [
        SourceReport(
            planned["name"],
            planned["files"],
            planned["bytes"],
            left_out=Counter(left_out),
            listing_sha256=planned["listing_sha256"],
        )
        for planned, left_out in zip(plan.sources, layout.left_out, strict=True)
    ]
    kinds = DocumentKinds()
    for job in range(sum(layout.shards)):
        counts = read_counts(plan.folder, job)
        kinds.merge(counts.kinds)
        for number, source in enumerate(sources):
            source.documents += counts.documents[number]
            source.raw_bytes += counts.bytes[number]
            source.left_out.update(counts.left_out[number])
    for source in sources:
        source.left_out = +source.left_out
    skipped = left_out_kinds(plan.folder / "corpus" / "skipped.jsonl")
    corpora = {part: _record_of(part_folder(plan, number)) for number, part in enumerate(plan.options.parts)}
    return PrepareReport(plan.identity, list(plan.options.parts), sources, kinds.sorted(), skipped, corpora)


def _record_of(folder: Path) -> PartRecord:
    with closing(Folder(folder)) as storage:
        manifest = read_manifest(storage)
    return PartRecord(manifest["manifest_sha256"], manifest.get(CARD_FIELD))
