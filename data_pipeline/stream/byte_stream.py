"""Stream: training sequence number g of a run, for any g, as a function of the corpus and a few numbers.

    sequence numbers ─▶ Order ─▶ ranges of blocks ─▶ Corpus, verified and decompressed ─▶ Rows

No rank, worker or batch size appears. The data state of a run is one integer, and a run resumes exactly on any number
of processes. With as many lanes as rows in a batch, row j of the next batch continues row j.

Bytes that must not be read become padding, and the bytes after them keep their positions. A damaged block is such a
hole, and so is a withdrawn document.
"""

import hashlib
import json
import logging
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.withdrawn import Withdrawal
from data_pipeline.errors import CorpusError, CorruptBlockError
from data_pipeline.stream.order import EXTENT_BYTES, ORDER_VERSION, Order, Piece, Run
from data_pipeline.stream.rows import Ids, Memory, Rows, Window

log = logging.getLogger(__name__)

WHOLE_BLOCK = 1 << 33
"""A number greater than the size of any block's content."""


class PackingConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How documents become rows."""

    packing: Literal["concatenate", "document"] = "concatenate"
    """concatenate: documents one after another, cut into rows of the model's length. document: one row for each
    document, cut to that length or padded, for images and other media of fixed size."""
    separate_documents: bool = True
    """Put id 256 after each document, so that the model learns where documents end. Off for media of fixed size."""


class Mask(NamedTuple):
    """Range of a block's content that is not read from some sequence on."""

    start: int
    """Offset of the first byte."""
    stop: int
    """Offset after the last byte."""
    since: int
    """First sequence that does not read it."""


class _Content(NamedTuple):
    """A block as the stream reads it."""

    units: NDArray[np.uint8]
    """The block's content; only its raw bytes if documents are concatenated without separators."""
    ends: NDArray[np.int64]
    """Offsets of the ends of documents in the content."""


class ByteStream:
    """Training sequences of one corpus. `stream[g]` is sequence number g: (sequence_length,) ids.

    This is a pure function. Many threads may read at once.

    Args:
        corpus: the corpus.
        packing: how documents become rows.
        sequence_length: ids of a sequence.
        lanes: lanes of the order.
        seed: seed of the order.
        bad_blocks: number of damaged blocks that become holes; one more is an error.

    Raises:
        CorpusError: the corpus is shorter than one sequence.
    """

    def __init__(
        self, corpus: Corpus, packing: PackingConfig, sequence_length: int, *, lanes: int, seed: int, bad_blocks: int
    ) -> None:
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.packing = packing
        self._separate = packing.separate_documents
        self._bad_blocks = bad_blocks
        by_document = packing.packing == "document"
        unit = 1 if by_document else sequence_length
        self._read_run = self._read_documents if by_document else self._read_bytes
        self.order = Order(corpus.lengths["raw_bytes"], self._units_of, unit, lanes, seed)
        if self.order.sequences_per_epoch == 0:
            raise CorpusError(
                f"{corpus.location} has {count(corpus.raw_bytes, 'byte')}, which is less than one sequence of "
                f"{sequence_length:,}; use a larger corpus, or lower model.sequence_length"
            )
        self._identity = {
            "order": ORDER_VERSION,
            "content_sha256": corpus.content_sha256,
            "sequence_length": sequence_length,
            **packing.model_dump(),
            "lanes": lanes,
            "seed": seed,
            "extent_bytes": EXTENT_BYTES,
        }
        self._contents: OrderedDict[int, Future[_Content]] = OrderedDict()
        self._lock = threading.Lock()
        self._memory = Memory()
        self._remembered = set[int]()
        self.holes: dict[int, int] = {}
        """Damaged blocks found so far, each with the first sequence that did not read it."""
        self._withdrawn: dict[int, list[Mask]] = {}

    def _units_of(self, first: int, last: int) -> NDArray[np.int64]:
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

    def remember_holes(self, holes: Mapping[int, int]) -> None:
        """Add the holes of the run's past: blocks, and the first sequence that did not read each."""
        self._remembered = set(holes)
        self.holes.update(holes)

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
        window = Window(len(sequences), self.sequence_length, self._memory)
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
                if self._separate:
                    ends = content.ends
                    own = ends[ends.searchsorted(piece.start) : ends.searchsorted(stop)]
                    if len(own):
                        window.separate(own + (place - piece.start))
                if self.holes or self._withdrawn:
                    for mask in self.masks(piece.block):
                        self._apply(mask, content, piece, sequences, window, place, begin)
                if stop == len(content.units):  # the lane has read this block to its end
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
                    while len(self._contents) > 2 * self.order.lanes:
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
        steps_over = self.packing.packing == "concatenate" and not self._separate
        return _Content(np.delete(units, ends) if steps_over else units, ends)

    def _read_documents(self, run: Run, sequences: NDArray[np.int64], window: Window, place: int) -> None:
        """Read a run to a place of a window: a row for each document."""
        pieces = self.order.pieces(run.epoch, run.start, run.start + len(sequences))
        documents = ((piece, ordinal) for piece in pieces for ordinal in range(piece.start, piece.start + piece.length))
        for (piece, ordinal), sequence in zip(documents, sequences.tolist(), strict=True):
            self._read_document(piece, ordinal, sequence, window, place)
            place += self.sequence_length

    def _read_document(self, piece: Piece, ordinal: int, sequence: int, window: Window, place: int) -> None:
        """Read a document's first bytes, the separator if there is room, and padding."""
        end_of_row = place + self.sequence_length
        block, start, ended = piece.block, -1, False
        while place < end_of_row and not ended:
            content = self._content(
                piece._replace(block=block, last_of_extent=max(block, piece.last_of_extent)), sequence
            )
            if content is None:
                break
            if start < 0:
                start = self._start_of(block, content.ends, ordinal)
            index = bisect_left(content.ends, start)
            ended = index < len(content.ends)
            stop = int(content.ends[index]) + self._separate if ended else len(content.units)
            length = min(stop - start, end_of_row - place)
            has_separator = ended and self._separate and length == stop - start
            window.put(place, content.units[start : start + length])
            if has_separator:
                window.separate(np.array([place + length - 1]))
            for mask in self.masks(block):
                if sequence >= mask.since:
                    covered = max(mask.start, start) - start, min(mask.stop - start, length)
                    window.pad(place + covered[0], place + covered[1])
            place += length
            block, start = block + 1, 0
        window.pad(place, end_of_row)

    def _start_of(self, block: int, ends: NDArray[np.int64], ordinal: int) -> int:
        """Return the offset of a document in a block's content.

        Args:
            block: number of the block.
            ends: where documents end in the content.
            ordinal: number of the document among those that begin in the block.
        """
        lengths = self.corpus.lengths[block]
        last = int(lengths["raw_bytes"]) + len(ends) - 1
        inner = int(ends.searchsorted(last))  # number of ends that are followed by another document
        first_begins_here = int(lengths["documents"]) > inner
        if first_begins_here:
            return int(ends[ordinal - 1]) + 1 if ordinal else 0
        return int(ends[ordinal]) + 1

    def _note_hole(self, block: int, sequence: int, error: CorruptBlockError) -> None:
        with self._lock:
            known = block in self.holes
            if block in self._remembered:
                raise CorruptBlockError(f"{error}; the run read it before sequence {self.holes[block]:,}") from error
            if not known and len(self.holes) >= self._bad_blocks:
                raise CorruptBlockError(
                    f"{error}; data.bad_blocks allows {count(self._bad_blocks, 'damaged block')}"
                ) from error
            self.holes[block] = min(sequence, self.holes.get(block, sequence))
        if not known:
            log.warning("%s; the loss does not count its bytes", error)
