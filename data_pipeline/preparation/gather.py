"""Gathering: write the documents of one shard, from every run, as a tar.

runs ─▶ Spool ─▶ in order of hash, without copies ─▶ pack_documents ─▶ write_shard ─▶ corpus/train/shard-….tar

shards/
    000012.npz              the shard's ShardIndex, unless all its documents are empty
    000012.skipped.jsonl    documents that were left out, if there are any
    000012.json             counts, written last: the shard is done when this file exists
"""

import json
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

from byteloom.core.storage.files import sync
from byteloom.core.storage.state_files import StateFileError, read_json
from data_pipeline.corpus.blocks import Block, pack_documents
from data_pipeline.corpus.index import ShardIndex, write_shard
from data_pipeline.documents import Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.media import CARD_FIELD, MediaCard, common_card
from data_pipeline.preparation.layout import Layout
from data_pipeline.preparation.plan import Plan, begin_again, names_in, refuse_bad, skip_line
from data_pipeline.preparation.report import DocumentKind, DocumentKinds
from data_pipeline.preparation.spill import Spool, SpooledDocument, keep_if_any
from data_pipeline.sources.source_file import Skipped, skipped


class Gather:
    """Stage that writes shards. A job is a shard; it is done when its counts exist.

    Args:
        plan: the plan.
        layout: the layout.
        ahead: pack documents in one thread while another compresses and writes.
    """

    name = "gather"

    def __init__(self, plan: Plan, layout: Layout, ahead: bool = False) -> None:
        counts = zip(layout.shards, layout.bytes, strict=True)
        self.sizes = [size // shards for shards, size in counts for _ in range(shards)]
        self._plan, self._layout, self._ahead = plan, layout, ahead
        self._shards = plan.folder / "shards"

    def done(self) -> set[int]:
        """Return the jobs that are done."""
        return {int(name[:-5]) for name in names_in(self._shards) if re.fullmatch(r"[0-9]+\.json", name)}

    def is_done(self, job: int) -> bool:
        """Return whether a job is done."""
        return (self._shards / f"{job:06d}.json").exists()

    def do(self, job: int, folder: Path, progress: Callable[[int], None]) -> None:
        """Do a job. See `WorkStage.do`."""
        gather_shard(self._plan, self._layout, job, folder, progress, self._ahead)


def gather_shard(
    plan: Plan, layout: Layout, job: int, folder: Path, progress: Callable[[int], None], ahead: bool
) -> None:
    """Write a shard, its index and its counts, in this order.

    Args:
        plan: the plan.
        layout: the layout.
        job: number of the shard among those of all parts.
        folder: empty folder for files that are not complete.
        progress: called with the raw bytes of each block.
        ahead: pack documents in one thread while another compresses and writes.

    Raises:
        CorpusError: a document cannot be read, unless `skip_bad`.
    """
    part, number = layout.shard(job)
    first, last = layout.hashes(part, number)
    spool = Spool(folder / "spool", plan.folder, plan.options)
    with (folder / "skipped.jsonl").open("wb") as log:
        for run in layout.runs:
            spool.add_run(run, part, first, last)
        tally = DocumentCounter(plan, log)
        documents = tally.counted(spool.records())
        blocks = pack_documents(documents, plan.options.block_bytes, tally.leave_out)

        def reported() -> Iterator[Block]:
            for block in _ahead(blocks) if ahead else blocks:
                yield block
                progress(block.raw_bytes)

        index = write_shard(folder, number, reported(), plan.options.level)
    spool.close()
    keep_if_any(folder / "skipped.jsonl")
    done = plan.folder / "shards"
    if index is not None:
        name = index.entry["name"]
        (folder / name).replace(part_folder(plan, part) / name)
        sync(part_folder(plan, part))
        index.save(folder / "index.npz")
        (folder / "index.npz").replace(done / f"{job:06d}.npz")
    if (folder / "skipped.jsonl").exists():
        (folder / "skipped.jsonl").replace(done / f"{job:06d}.skipped.jsonl")
    (folder / "counts.json").write_text(json.dumps({"empty": index is None, **tally.counts()}), encoding="utf-8")
    sync(folder / "counts.json")
    (folder / "counts.json").replace(done / f"{job:06d}.json")
    sync(done)


def _ahead(blocks: Iterator[Block]) -> Iterator[Block]:
    """Yield blocks that another thread prepares. At most three blocks are in memory.

    This keeps all cores of a machine busy when fewer shards are left than there are workers.
    """
    ready: queue.Queue[Block | BaseException | None] = queue.Queue(1)

    def make() -> None:
        try:
            for block in blocks:
                ready.put(block)
            ready.put(None)
        except BaseException as error:  # raised again where the blocks are used
            ready.put(error)

    threading.Thread(target=make, daemon=True).start()
    while (block := ready.get()) is not None:
        if isinstance(block, BaseException):
            raise block
        yield block


def part_folder(plan: Plan, part: int) -> Path:
    """Return the folder in which the corpus of a part is written."""
    return plan.folder / "corpus" / plan.options.parts[part]


@dataclass(frozen=True)
class ShardCounts:
    """Counts of a shard for each source."""

    empty: bool
    """Whether the shard has no document. Such a shard has no tar."""
    documents: list[int]
    """Documents of each source."""
    bytes: list[int]
    """Raw bytes of each source."""
    left_out: list[dict[str, int]]
    """Documents of each source that were left out, by reason."""
    kinds: list[DocumentKind] = field(default_factory=list)
    """Documents by suffix and modality."""
    media: dict[str, Any] | None = None
    """Card of its documents. None if they have none in common, or an earlier version of Byteloom wrote the shard."""


def read_counts(folder: Path, job: int) -> ShardCounts:
    """Return the counts of a shard that is done.

    Args:
        folder: OUT.partial
        job: number of the shard among those of all parts.

    Raises:
        StateFileError: they are missing, cannot be read, or are damaged.
    """
    path = folder / "shards" / f"{job:06d}.json"
    counts = read_json(path, ShardCounts, _advice(path))
    if counts is None:
        raise StateFileError(f"{path} is missing; {begin_again(folder)}")
    return counts


def read_index(folder: Path, job: int) -> ShardIndex | None:
    """Return the index of a shard that is done; an empty shard has none. See `read_counts`."""
    if read_counts(folder, job).empty:
        return None
    path = folder / "shards" / f"{job:06d}.npz"
    try:
        return ShardIndex.load(path)
    except (BadZipFile, EOFError, KeyError, OSError, ValueError) as error:
        raise StateFileError.damaged(path, str(error), _advice(path.with_suffix(".json"))) from error


def read_card(folder: Path, jobs: range) -> MediaCard | None:
    """Return the card of the documents of several shards that are done. See `read_counts`."""
    counts = (read_counts(folder, job) for job in jobs)
    stored = (each.media for each in counts if not each.empty)
    return common_card(None if card is None else MediaCard.from_json(card) for card in stored)


def _advice(path: Path) -> str:
    return f"remove {path} and give the same command again, which then writes that shard again"


class DocumentCounter:
    """Counter of the documents of a shard while they are packed. It leaves out copies."""

    def __init__(self, plan: Plan, log: BinaryIO) -> None:
        self._plan, self._log = plan, log
        sources = range(len(plan.sources))
        self._documents, self._bytes = [0 for _ in sources], [0 for _ in sources]
        self._left_out = [Counter[str]() for _ in sources]
        self._kinds = DocumentKinds()
        self._card: MediaCard | None = None  # of the documents so far
        self._is_first = True  # whether the next document is the first
        self._source = 0  # source of the present document
        self._size = 0  # its bytes, when it was read last
        self._is_bad = False

    def counted(self, records: Iterator[SpooledDocument]) -> Iterator[Document]:
        """Yield the documents to pack. Each must be packed or left out before the next is requested."""
        seen: dict[bytes, str] = {}  # content digest to key, for the documents with the present hash
        for record in records:
            document, self._source = record.document, record.source
            if record.digest is not None:
                if not record.follows_equal_hash:
                    seen.clear()
                first = seen.setdefault(record.digest, document.key)
                if first is not document.key:
                    self._note(Skipped(document.key, "duplicate", f"the same bytes as {first}"))
                    continue
            self._is_bad = False
            if record.size is None:
                document.read = self._measured(document.read)
            else:
                self._size = record.size
            yield document
            if self._is_bad:
                continue
            if self._size:
                self._documents[self._source] += 1
                self._bytes[self._source] += self._size
                self._kinds.add(document.key, document.modality, self._size)
                if self._is_first or document.media != self._card:
                    self._card = document.media if self._is_first else common_card((self._card, document.media))
                self._is_first = False
            else:
                self._note(Skipped(document.key, "empty", "it has no byte"))

    def _measured(self, pieces: Callable[[], Iterator[bytes]]) -> Callable[[], Iterator[bytes]]:
        def read() -> Iterator[bytes]:
            self._size = 0
            for piece in pieces():
                self._size += len(piece)
                yield piece

        return read

    def leave_out(self, document: Document, error: BadDocumentError) -> None:
        """Count a document that cannot be read. `pack_documents` calls this."""
        left_out = skipped(document.key, error)
        refuse_bad(left_out, self._plan.options, self._plan.folder)
        self._is_bad = True
        self._note(left_out)

    def _note(self, left_out: Skipped) -> None:
        self._left_out[self._source][left_out.reason] += 1
        self._log.write(skip_line(self._source, left_out))

    def counts(self) -> dict[str, Any]:
        """Return the counts of each source, and the card of the documents."""
        kinds = [asdict(kind) for kind in self._kinds.sorted()]
        counts = {"documents": self._documents, "bytes": self._bytes, "left_out": self._left_out, "kinds": kinds}
        return counts if self._card is None else {**counts, CARD_FIELD: self._card.as_json()}
