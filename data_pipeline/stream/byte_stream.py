"""Stream: training sequence number g of a run, for any g, as a function of the corpus and a few numbers.

    sequence numbers ─▶ Order ─▶ ranges of blocks ─▶ Corpus, verified and decompressed ─▶ Rows

No rank, worker or batch size appears. The data state of a run is one integer, and a run resumes exactly on any number
of processes. With as many lanes as rows in a batch, row j of the next batch continues row j.

Bytes that must not be read become padding, and the bytes after them keep their positions. A damaged block is such a
hole, and so is a withdrawn document.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, model_validator

from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.entropies import Entropies, StoredEntropies
from data_pipeline.corpus.withdrawn import Withdrawal
from data_pipeline.errors import CorpusError, CorruptBlockError
from data_pipeline.stream.documents import DocumentRows, Ends, HoleError, LongDocuments, read_rows_of_blocks
from data_pipeline.stream.order import EXTENT_BYTES, ORDER_VERSION, SMALL_BYTES, Order, Piece, Run
from data_pipeline.stream.rows import Ids, Memory, Rows, Window

WHOLE_BLOCK = 1 << 33
"""A number greater than the size of any block's content."""


class PackingConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Packing of documents into rows."""

    packing: Literal["concatenate", "document"] = "concatenate"
    """Packing of documents into rows. concatenate: documents one after another, cut into rows of the model's length.
    document: each row belongs to one document, and is padded to that length, for images and other media of fixed
    size."""
    documents: LongDocuments = "cut"
    """With packing document: treatment of a document that is longer than a row. cut: its first bytes are read, the rest
    never. split: it has as many rows as it needs. crop: one row, from a place that differs in each epoch. With split,
    each start reads where documents end in every block: a request a block if the corpus is at a URL."""
    separate_documents: bool = True
    """Put id 256 after each document, so that the model learns where documents end. Off for media of fixed size."""

    @model_validator(mode="after")
    def _documents_have_rows(self) -> Self:
        if self.documents != "cut" and self.packing != "document":
            raise ValueError(f"documents: {self.documents} needs packing: document")
        return self


class Mask(NamedTuple):
    """Range of a block's content that is not read from some sequence on."""

    start: int
    """Offset of the first byte."""
    stop: int
    """Offset after the last byte."""
    since: int
    """First sequence that skips it."""


class _Content(NamedTuple):
    """A block as the stream reads it."""

    units: NDArray[np.uint8]
    """The block's content; only its raw bytes if documents are concatenated without separators."""
    ends: NDArray[np.int64]
    """Offsets of the ends of documents in the content."""
    entropies: Entropies | None
    """Entropies of the units; None if they are not read."""


class ByteStream:
    """Training sequences of one corpus. `stream[g]` is sequence number g: (sequence_length,) ids.

    This is a pure function. Many threads may read at once.

    Args:
        corpus: the corpus.
        packing: how documents become rows.
        sequence_length: ids of a sequence.
        lanes: lanes of the order.
        seed: seed of the order.
        bad_blocks: number of damaged blocks that become holes; one more is an error. None: any number, for a run, whose
            ranks agree on holes together (see Reading).
        version: version of the order.
        entropies: entropies beside the corpus, which rows have too. No other part of the rows depends on them.

    Raises:
        CorpusError: the corpus is shorter than one sequence.
    """

    def __init__(
        self,
        corpus: Corpus,
        packing: PackingConfig,
        sequence_length: int,
        *,
        lanes: int,
        seed: int,
        bad_blocks: int | None,
        version: int = ORDER_VERSION,
        entropies: StoredEntropies | None = None,
    ) -> None:
        self._options: dict[str, Any] = {"lanes": lanes, "seed": seed, "bad_blocks": bad_blocks, "entropies": entropies}
        self._entropies = entropies
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.packing = packing
        self._separate = packing.separate_documents
        self.bad_blocks = bad_blocks
        by_document = packing.packing == "document"
        unit = 1 if by_document else sequence_length
        self._read_run = self._read_documents if by_document else self._read_bytes
        self.rows = DocumentRows(corpus.lengths, sequence_length, self._separate, packing.documents, seed)
        is_split = by_document and packing.documents == "split"
        self._rows_of_blocks = read_rows_of_blocks(corpus, sequence_length) if is_split else None
        self.order = Order(corpus.lengths["raw_bytes"], self._units_of, unit, lanes, seed, version)
        if self.order.sequences_per_epoch == 0:
            raise CorpusError(
                f"{corpus.location} has {count(corpus.raw_bytes, 'byte')}, which is less than one sequence of "
                f"{sequence_length:,}; use a larger corpus, or lower model.sequence_length"
            )
        self._identity = {
            "order": version,
            "content_sha256": corpus.content_sha256,
            "sequence_length": sequence_length,
            "packing": packing.packing,
            "separate_documents": packing.separate_documents,
            "lanes": lanes,
            "seed": seed,
            "extent_bytes": EXTENT_BYTES,
        }
        if packing.documents != "cut":
            self._identity["documents"] = packing.documents
        if self._rows_of_blocks is not None:  # all ranks must have found the same
            self._identity["rows"] = hashlib.sha256(self._rows_of_blocks.astype("<i8").tobytes()).hexdigest()
        self._is_kept = corpus.raw_bytes <= SMALL_BYTES
        """True if the whole corpus stays in memory."""
        self._contents: OrderedDict[int, Future[_Content]] = OrderedDict()
        self._lock = threading.Lock()
        self._memory = Memory()
        self._remembered = set[int]()
        self.holes: dict[int, int] = {}
        """Damaged blocks found so far, each with the first sequence that did not read it."""
        self.damage: dict[int, str] = {}
        """Description of the damage of each block that this process could not read."""
        self._withdrawn: dict[int, list[Mask]] = {}

    def _units_of(self, first: int, last: int) -> NDArray[np.int64]:
        if self._rows_of_blocks is not None:
            return self._rows_of_blocks[first:last]
        lengths = self.corpus.lengths[first:last]
        if self.packing.packing == "document":
            return lengths["documents"].astype(np.int64)
        units = lengths["raw_bytes"].astype(np.int64)
        return units + lengths["document_ends"] if self._separate else units

    @property
    def fingerprint(self) -> str:
        """Digest of everything on which the order and content of the stream depend."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    @property
    def sequences_per_epoch(self) -> int:
        """Number of sequences of an epoch."""
        return self.order.sequences_per_epoch

    def in_version(self, version: int) -> "ByteStream":
        """Return the stream of the same corpus in a version of the order."""
        if version == self._identity["order"]:
            return self
        return ByteStream(self.corpus, self.packing, self.sequence_length, **self._options, version=version)

    def skip(self, holes: Mapping[int, int]) -> None:
        """Add holes: blocks, and the first sequence that does not read each."""
        with self._lock:
            self.holes.update(holes)

    def remember_holes(self, holes: Mapping[int, int]) -> None:
        """Add the holes of the run's past: an earlier sequence that cannot read such a block is an error."""
        self.skip(holes)
        self._remembered = set(holes)

    def found_holes(self) -> dict[int, int]:
        """Return a copy of `holes`, while other threads read."""
        with self._lock:
            return dict(self.holes)

    def withdraw(self, entries: Iterable[tuple[Withdrawal, int]]) -> None:
        """Mask documents, each from a sequence number on."""
        for entry, since in entries:
            self._withdrawn.setdefault(entry.block, []).append(Mask(entry.start, entry.stop, since))

    def __getitem__(self, sequence: int) -> Ids:
        """Return training sequence number `sequence`: (sequence_length,) int16 ids."""
        row: Ids = self.read(np.array([sequence], np.int64)).ids[0]
        return row

    def read(self, sequences: NDArray[np.int64]) -> Rows:
        """Return training sequences as one group. See `read_groups`."""
        return self.read_groups([sequences])[0]

    def read_groups(self, groups: Sequence[NDArray[np.int64]]) -> list[Rows]:
        """Return groups of training sequences, which share memory.

        Sequences that follow each other in a lane are read together, also across groups, so request many at once.

        Raises:
            CorpusError: a block cannot be read, or more blocks are damaged than the config allows.
        """
        sequences = np.concatenate(groups)
        has_entropies = self._entropies is not None
        window = Window(len(sequences), self.sequence_length, self._memory, has_entropies=has_entropies)
        rows = list[int]()
        # In the order of first rows: consecutive rows are then evenly spaced.
        for run in sorted(self.order.runs(sequences), key=lambda run: run.rows.start):
            self._read_run(run, sequences[run.rows], window, len(rows) * self.sequence_length)
            rows.extend(range(run.rows.start, run.rows.stop, run.rows.step))
        slots = np.empty_like(sequences)
        slots[rows] = np.arange(len(rows))
        return window.in_groups(slots, [len(group) for group in groups])

    def _read_bytes(self, run: Run, sequences: NDArray[np.int64], window: Window, place: int) -> None:
        """Read a run to a place of a window."""
        begin, length = place, self.sequence_length
        for piece in self.order.pieces(run.epoch, run.start, run.start + len(sequences) * length):
            content = self._content(piece, sequences.item((place - begin) // length))
            stop = piece.start + piece.length
            if content is None:
                window.pad(place, place + piece.length)
            else:
                window.put(place, content.units[piece.start : stop])
                if content.entropies is not None:
                    window.put_entropies(place, content.entropies[piece.start : stop])
                if self._separate:
                    ends = content.ends
                    own = ends[ends.searchsorted(piece.start) : ends.searchsorted(stop)]
                    if len(own):
                        window.separate(own + (place - piece.start))
                if self.holes or self._withdrawn:
                    for mask in self.masks(piece.block):
                        self._apply(mask, content, piece, sequences, window, place, begin)
                if stop == len(content.units) and not self._is_kept:  # the lane has read this block to its end
                    with self._lock:
                        self._contents.pop(piece.block, None)
            place += piece.length

    def masks(self, block: int) -> list[Mask]:
        """Return the ranges of a block that must not be read."""
        masks = self._withdrawn.get(block, [])
        if block in self.holes:  # a block with a hole may still be readable, as for sequences before the damage
            return [*masks, Mask(0, WHOLE_BLOCK, self.holes[block])]
        return masks

    def _apply(
        self,
        mask: Mask,
        content: _Content,
        piece: Piece,
        sequences: NDArray[np.int64],
        window: Window,
        place: int,
        begin: int,
    ) -> None:
        """Pad the range of a piece that a mask covers, in the rows from which on it is masked.

        Args:
            mask: the mask.
            content: content of the block.
            piece: the piece of the block.
            sequences: sequence numbers of the rows.
            window: the window.
            place: place of the piece in the window.
            begin: place of the first of the sequences.
        """
        start, stop = mask.start, mask.stop
        if not self._separate:  # change offsets in the content to offsets in the raw bytes
            start -= int(content.ends.searchsorted(start))
            stop -= int(content.ends.searchsorted(stop))
        first = place + max(0, start - piece.start)
        last = place + min(piece.length, stop - piece.start)
        length = self.sequence_length
        for number in range((first - begin) // length, -((begin - last) // length)):
            if sequences[number] >= mask.since:
                row = begin + number * length
                window.pad(max(first, row), min(last, row + length))

    def _content(self, piece: Piece, sequence: int) -> _Content | None:
        """Return a block; None for a hole. The first thread reads it, and it is kept while its lane reads it.

        A small corpus is kept whole.

        Raises:
            CorruptBlockError: the block is damaged, and more blocks are damaged than the config allows.
        """
        if self.holes and self.holes.get(piece.block, sequence + 1) <= sequence:
            return None
        future, mine = self._contents.get(piece.block), False
        if future is None:
            with self._lock:
                future = self._contents.get(piece.block)
                mine = future is None
                if future is None:
                    future = self._contents[piece.block] = Future()
                    while len(self._contents) > 2 * self.order.lanes and not self._is_kept:
                        self._contents.popitem(last=False)
        if mine:
            try:
                future.set_result(self._read_content(piece))
            except BaseException as error:
                with self._lock:
                    self._contents.pop(piece.block, None)
                future.set_exception(error)
        try:
            return future.result()
        except CorruptBlockError as error:
            self._note_hole(piece.block, sequence, error)
            return None

    def _read_content(self, piece: Piece) -> _Content:
        content, document_ends = self.corpus.read_content(piece.block, through=piece.last_of_extent)
        units, ends = np.frombuffer(content, np.uint8), document_ends.astype(np.int64)
        entropies = None
        if self._entropies is not None:
            entropies = self._entropies.read(piece.block, through=piece.last_of_extent)
        if self.packing.packing == "concatenate" and not self._separate:  # rows step over the ends of documents
            units = np.delete(units, ends)
            entropies = None if entropies is None else np.delete(entropies, ends)
        return _Content(units, ends, entropies)

    def _read_documents(self, run: Run, sequences: NDArray[np.int64], window: Window, place: int) -> None:
        """Read a run of rows of documents to a place of a window."""
        pieces = self.order.pieces(run.epoch, run.start, run.start + len(sequences))
        documents = ((piece, number) for piece in pieces for number in range(piece.start, piece.start + piece.length))
        for (piece, number), sequence in zip(documents, sequences.tolist(), strict=True):
            self._read_document(piece, number, run.epoch, sequence, window, place)
            place += self.sequence_length

    def _read_document(self, piece: Piece, number: int, epoch: int, sequence: int, window: Window, place: int) -> None:
        """Read a row of a document, the separator if there is room, and padding."""
        end_of_row = place + self.sequence_length
        contents: dict[int, _Content] = {}

        def ends_of(block: int) -> Ends:
            through = max(block, piece.last_of_extent)
            content = self._content(piece._replace(block=block, last_of_extent=through), sequence)
            if content is None:
                raise HoleError(block)
            contents[block] = content
            return content.ends

        with suppress(HoleError):  # the row ends there
            for part in self.rows.parts(piece.block, number, epoch, ends_of):
                length = part.stop - part.start
                content = contents[part.block]
                window.put(place, content.units[part.start : part.stop])
                if content.entropies is not None:
                    window.put_entropies(place, content.entropies[part.start : part.stop])
                if part.has_separator:
                    window.separate(np.array([place + length - 1]))
                for mask in self.masks(part.block):
                    if sequence >= mask.since:
                        covered = max(mask.start - part.start, 0), min(mask.stop - part.start, length)
                        window.pad(place + covered[0], place + covered[1])
                place += length
        window.pad(place, end_of_row)

    def _note_hole(self, block: int, sequence: int, error: CorruptBlockError) -> None:
        with self._lock:
            since = self.holes.get(block)
            if block in self._remembered and sequence < self.holes[block]:
                raise CorruptBlockError(f"{error}; the run read it before sequence {since:,}") from error
            if since is None and self.bad_blocks is not None and len(self.holes) >= self.bad_blocks:
                raise CorruptBlockError(
                    f"{error}; data.bad_blocks allows {count(self.bad_blocks, 'damaged block')}"
                ) from error
            self.holes[block] = sequence if since is None else min(sequence, since)
            self.damage[block] = str(error)
