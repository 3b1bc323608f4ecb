"""Preparation: files of any kind become a corpus. Parallel, restartable at any moment, exactly once.

    sources ─▶ plan ─▶ units ─▶ scatter ─▶ runs sorted by hash ─▶ layout ─▶ gather ─▶ shards ─▶ finish ─▶ OUT
               once             a job each                        once      a job each          once

Everything is written in OUT.partial, from which the corpus is renamed to OUT at the end. What a step wrote is there
whole or not at all, so whatever is killed, the same command goes on with the steps and jobs that are not done. Workers
and tasks of a scheduler's array share the jobs through that folder and may change in number: the corpus is a function
of the sources and the options alone.

Memory of a process, whatever the size of the corpus and of a document: about 50 MB of libraries, and the larger of
spill.BUFFER_BYTES (scattering), and 40 bytes a document of one shard and some six blocks (gathering); one folder's
entries while it is listed. Media are as their readers say. Disk, besides OUT: the raw bytes of documents that come out
of containers, and once more those of the shards being gathered.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from byteloom.core.files import replace_file, sync
from byteloom.core.locks import lock_file
from byteloom.core.progress import Progress, ignore
from byteloom.core.state_files import StateFileError, read_json
from data_pipeline.corpus.index import ShardIndex
from data_pipeline.corpus.manifest import write_index
from data_pipeline.errors import CorpusError
from data_pipeline.preparation.gather import Gather, part_folder, read_shard
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
from data_pipeline.preparation.scatter import Scatter
from data_pipeline.preparation.spill import unit_folder
from data_pipeline.preparation.work import Pool

__all__ = ["PrepareOptions", "PrepareReport", "SourceReport", "Task", "prepare"]

SMALL_BYTES = 32 << 20
"""Sources of fewer bytes are prepared by one process: starting others takes longer. They start while others list."""


@dataclass(frozen=True)
class Task:
    """Which of the tasks of an array this is. It says where to begin; any of the tasks can do the work of all."""

    number: int = 0
    of: int = 1
    merges: bool = True
    """Whether it makes OUT of the shards when all are written; False where a call that comes after the array does."""

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise CorpusError(
                f"--task is {self.number} and --of is {self.of}; --task must be between 0 and {self.of - 1}"
            )


@dataclass
class SourceReport:
    """What became of one source."""

    name: str
    files: int
    bytes: int
    """Of the files, as listed."""
    documents: int = 0
    """In the corpus, and their raw bytes."""
    raw_bytes: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """How many documents were left out, by reason (sources.REASONS); over the limit, how many files were not begun."""


@dataclass
class _StoredReport:
    sources: list[str]
    folder: str | None
    options: dict[str, Any]
    parts: list[str]
    per_source: list[SourceReport]


@dataclass
class PrepareReport:
    """OUT/report.json."""

    identity: dict[str, Any]
    """Sources and options."""
    parts: list[str]
    """Folders of OUT that are a corpus each; '' is OUT itself."""
    sources: list[SourceReport]
    was_finished: bool = False
    """Whether there was nothing to do any more."""

    @property
    def documents(self) -> int:
        return sum(source.documents for source in self.sources)

    @property
    def left_out(self) -> int:
        return sum(source.left_out.total() for source in self.sources)

    def as_json(self) -> dict[str, Any]:
        totals = {"documents": self.documents, "raw_bytes": sum(source.raw_bytes for source in self.sources)}
        return {**self.identity, "parts": self.parts, **totals, "per_source": [vars(source) for source in self.sources]}

    def save(self, path: Path) -> None:
        replace_file(path, json.dumps(self.as_json(), indent=1))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the report of a corpus.

        Raises:
            StateFileError: it is missing, cannot be read, or is damaged.
        """
        stored = read_json(path, _StoredReport, "restore it, or prepare the corpus again")
        if stored is None:
            raise StateFileError(f"{path} is missing")
        same = {"sources": stored.sources, "folder": stored.folder, "options": stored.options}
        return cls(same, stored.parts, stored.per_source)


def prepare(
    sources: Sequence[str | Path],
    out: Path,
    options: PrepareOptions,
    progress: Progress = ignore,
    workers: int = 1,
    task: Task = Task(),
) -> PrepareReport | None:
    """Writes the documents of the sources as a corpus at `out`, which appears when it is complete.

    Begun work with the same sources and options is gone on with, be it of a process that was killed or of others that
    are at it now.

    Args:
        workers: processes to share the work among.
        task: which task of an array of such calls this is.

    Returns:
        What is at `out`; None if all shards are written, and the task does not merge them.

    Raises:
        CorpusError: a source is missing, a document cannot be read, there is no byte to write, `out` exists and is not
            this corpus, or `out`.partial holds work of other sources or options.
    """
    names = [str(source) for source in sources]
    asked = identity(names, options)
    folder = out.with_name(f"{out.name}.partial")
    with Pool(folder, options.skip_bad, workers, task.number / task.of, (task.number + 1) / task.of) as pool:

        def listed(size: int) -> None:
            if size >= SMALL_BYTES:
                pool.start()

        with _held(folder, out) as is_open:
            if not is_open:
                return _finished(out, folder, asked)
            plan = _planned(folder, names, options, listed)
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


@contextmanager
def _held(folder: Path, out: Path) -> Iterator[bool]:
    """Keeps OUT.partial for this process alone, making it if need be; says whether OUT is still to be made."""
    if out.exists():
        yield False
        return
    while True:
        folder.mkdir(parents=True, exist_ok=True)
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
    """The report of a corpus that is there, if it is the one asked for."""
    try:
        report = PrepareReport.load(out / "report.json")
    except StateFileError:
        report = None
    if report is None or report.identity != asked:
        raise CorpusError(f"{out} exists already; choose another --out, or remove that folder first")
    if folder.exists():
        remove(folder)
    report.was_finished = True
    return report


def _planned(folder: Path, sources: Sequence[str], options: PrepareOptions, listed: Callable[[int], None]) -> Plan:
    """The plan that is there, or a new one. Where none can be made, nothing stays on disk.

    Args:
        listed: told the bytes of the files, while they are listed too.
    """
    if (folder / "plan.json").exists():
        plan = Plan.load(folder, options.skip_bad)
        if changed := difference(plan.identity, identity(sources, options)):
            raise CorpusError(
                f"{folder} was started with other sources or options ({changed}); "
                "use the same ones, or remove that folder to start again"
            )
        listed(sum(source["bytes"] for source in plan.sources))
        return plan
    try:
        for name in ("units", "shards", *(f"corpus/{part}" for part in options.parts)):
            (folder / name).mkdir(parents=True, exist_ok=True)
        make_plan(folder, sources, options, listed)
    except BaseException:
        remove(folder)
        raise
    return Plan.load(folder, options.skip_bad)


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
    """Makes shards a corpus, and OUT.partial OUT. Killed at any moment, it can be done again."""
    if not (plan.folder / "layout.json").exists():
        raise CorpusError(f"{plan.folder} was removed while this command was working in it; start again")
    corpus = plan.folder / "corpus"
    if not (corpus / "report.json").exists():
        _write_indexes(plan, layout)
        _write_skipped(plan, layout, corpus / "skipped.jsonl")
        _report(plan, layout).save(corpus / "report.json")
    # The bulk goes before the rename, so that no kill leaves it beside a finished corpus.
    for name in ("units", "work"):
        shutil.rmtree(plan.folder / name, ignore_errors=True)
    corpus.rename(out)
    sync(out.parent)
    remove(plan.folder)
    return PrepareReport.load(out / "report.json")


def _write_indexes(plan: Plan, layout: Layout) -> None:
    for part, count in enumerate(layout.shards):
        before = sum(layout.shards[:part])

        def indexes(jobs: range) -> Iterator[ShardIndex]:
            for job in jobs:
                _, index = read_shard(plan.folder, job)
                if index is not None:
                    yield index

        try:
            write_index(part_folder(plan, part), indexes(range(before, before + count)))
        except CorpusError:
            remove(plan.folder)
            raise


def _write_skipped(plan: Plan, layout: Layout, path: Path) -> None:
    """Everything that was left out, by name; what lies beyond a limit is only counted."""
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
        SourceReport(planned["name"], planned["files"], planned["bytes"], left_out=Counter(left_out))
        for planned, left_out in zip(plan.sources, layout.left_out, strict=True)
    ]
    for job in range(sum(layout.shards)):
        counts, _ = read_shard(plan.folder, job)
        for number, source in enumerate(sources):
            source.documents += counts.documents[number]
            source.raw_bytes += counts.bytes[number]
            source.left_out.update(counts.left_out[number])
    for source in sources:
        source.left_out = +source.left_out
    return PrepareReport(plan.identity, list(plan.options.parts), sources)
