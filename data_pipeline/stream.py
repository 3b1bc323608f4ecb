"""The stream: training sequence number g of a run, for any g, as a function of the corpus and a few numbers.

    sequence numbers ─▶ Order ─▶ ranges of blocks ─▶ Corpus, verified and decompressed ─▶ rows of ids

No rank, worker or batch size appears, so the data state of a run is one integer, and a run goes on exactly on any
number of processes. With as many lanes as rows in a batch, row j of the next batch continues row j.

Bytes that are not to be read are padding, and nothing after them moves: a damaged block is a hole, and so is a
document that was withdrawn.
"""

import hashlib
import json
import logging
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from data_pipeline.errors import CorpusError, CorruptBlockError
from data_pipeline.order import EXTENT_BYTES, ORDER_VERSION, Order, Piece, Run
from data_pipeline.shards import Corpus
from data_pipeline.vocabulary import PADDING, SEPARATOR
from data_pipeline.withdrawn import Withdrawal

log = logging.getLogger(__name__)

Ids = NDArray[np.int16]

WHOLE_BLOCK = 1 << 32
"""More raw bytes than a block has."""


class Rows(NamedTuple):
    """Training sequences as they were read."""

    ids: Ids
    """(rows, T): 0..255 and SEPARATOR; PADDING in holes."""
    padded: bool
    """Whether any of them may be padding."""


class PackingConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How documents become rows."""

    packing: Literal["concatenate", "document"] = "concatenate"
    """concatenate: documents one after another, cut into rows of the model's length. document: a row each, cut to that
    length or padded, for images and other media of fixed size."""
    separate_documents: bool = True
    """Put id 256 after each document, so that the model learns where documents end. Off for media of fixed size."""


class Mask(NamedTuple):
    """Raw bytes of a block that sequences from `since` on do not read."""

    start: int
    stop: int
    since: int


class _Content(NamedTuple):
    """A block as the stream reads it."""

    raw: NDArray[np.uint8]
    ends: NDArray[np.uint32]
    """Of documents."""
    separators: NDArray[np.int64]
    """Their places among the raw bytes and themselves, where documents are concatenated with separators."""


class ByteStream:
    """`stream[g]` is training sequence number g: (sequence_length,) ids. A pure function; safe from many threads.

    Args:
        lanes, seed: of the order.
        bad_blocks: damaged blocks that become holes before one more is an error.

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
                f"{corpus.location} has {corpus.raw_bytes:,} bytes, less than one sequence of {sequence_length:,}"
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
        self._remembered = set[int]()
        self.holes: dict[int, int] = {}
        """Damaged blocks met so far, each with the first sequence that did not read it."""
        self._withdrawn: dict[int, list[Mask]] = {}

    def _units_of(self, first: int, last: int) -> NDArray[np.int64]:
        lengths = self.corpus.lengths[first:last]
        if self.packing.packing == "document":
            return lengths["documents"].astype(np.int64)
        units = lengths["raw_bytes"].astype(np.int64)
        return units + lengths["document_ends"] if self._separate else units

    @property
    def fingerprint(self) -> str:
        """Digest of everything the order and content of the stream depend on."""
        return hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()

    @property
    def sequences_per_epoch(self) -> int:
        return self.order.sequences_per_epoch

    def remember_holes(self, holes: Mapping[int, int]) -> None:
        """Holes of the run's past: blocks, and the first sequence that did not read each."""
        self._remembered = set(holes)
        self.holes.update(holes)

    def withdraw(self, entries: Iterable[tuple[Withdrawal, int]]) -> None:
        """Masks documents, each from a sequence number on."""
        for entry, since in entries:
            self._withdrawn.setdefault(entry.block, []).append(Mask(entry.start, entry.stop, since))

    def __getitem__(self, sequence: int) -> Ids:
        """Training sequence number `sequence`: (sequence_length,) int16 ids."""
        row: Ids = self.read(np.array([sequence], np.int64)).ids[0]
        return row

    def read(self, sequences: NDArray[np.int64]) -> Rows:
        """Training sequences. Those that follow each other in a lane are read together, so ask for many at once.

        Raises:
            CorpusError: a block cannot be read, or is damaged when more have been than the config allows.
        """
        ids = np.empty((len(sequences), self.sequence_length), np.int16)
        padded = False
        for run in self.order.runs(sequences):
            padded |= self._read_run(run, sequences[run.rows], ids[run.rows])
        return Rows(ids, padded)

    def _read_bytes(self, run: Run, sequences: NDArray[np.int64], rows: Ids) -> bool:
        """Reads a run into its rows; whether there is padding in them."""
        flat = np.empty(rows.size, np.int16)
        done, padded = 0, False
        for piece in self.order.pieces(run.epoch, run.start, run.start + rows.size):
            part = flat[done : done + piece.length]
            content = self._content(piece, int(sequences[done // self.sequence_length]))
            if content is None:
                part[:] = PADDING
                padded = True
            else:
                self._copy(content, piece, part)
                for mask in self.masks(piece.block):
                    padded |= self._apply(mask, content, piece, sequences, flat, done)
            done += piece.length
        rows[:] = flat.reshape(rows.shape)
        return padded

    def _copy(self, content: _Content, piece: Piece, part: Ids) -> None:
        stop = piece.start + piece.length
        first, last = int(content.separators.searchsorted(piece.start)), int(content.separators.searchsorted(stop))
        place, begin = 0, piece.start - first  # in the part, and in raw bytes
        for end in content.ends[first:last].tolist():
            gap = place + end - begin
            part[place:gap] = content.raw[begin:end]
            part[gap] = SEPARATOR
            place, begin = gap + 1, end
        part[place:] = content.raw[begin : stop - last]
        if stop == len(content.raw) + len(content.separators):  # its lane is through with this block
            with self._lock:
                self._contents.pop(piece.block, None)

    def masks(self, block: int) -> list[Mask]:
        """What is not to be read of a block."""
        masks = self._withdrawn.get(block, [])
        if block in self.holes:  # and yet it could be read, as sequences before the damage did
            return [*masks, Mask(0, WHOLE_BLOCK, self.holes[block])]
        return masks

    def _apply(
        self, mask: Mask, content: _Content, piece: Piece, sequences: NDArray[np.int64], flat: Ids, done: int
    ) -> bool:
        """Pads what a mask covers of a piece, which lies at flat[done:], in the rows that it is in force for."""
        start, stop = mask.start, mask.stop
        if self._separate:  # from raw bytes to places among separators
            start += int(content.ends.searchsorted(start, side="right"))
            stop += int(content.ends.searchsorted(stop, side="right"))  # with the separator of what ends there
        begin = done + max(0, start - piece.start)
        end = done + min(piece.length, stop - piece.start)
        length = self.sequence_length
        covered = [r for r in range(begin // length, -(-end // length)) if sequences[r] >= mask.since]
        for row in covered:
            flat[max(begin, row * length) : min(end, (row + 1) * length)] = PADDING
        return bool(covered)

    def _content(self, piece: Piece, sequence: int) -> _Content | None:
        """A block, read once by whichever thread comes first, and kept while its lane is in it; None for a hole.

        Raises:
            CorruptBlockError: it is damaged, and more have been than the config allows.
        """
        if self.holes.get(piece.block, sequence + 1) <= sequence:
            return None
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
        raw, ends = self.corpus.read_raw(piece.block, through=piece.last_of_extent)
        gaps = len(ends) if self._separate and self.packing.packing == "concatenate" else 0
        return _Content(np.frombuffer(raw, np.uint8), ends, ends[:gaps] + np.arange(gaps, dtype=np.int64))

    def _read_documents(self, run: Run, sequences: NDArray[np.int64], rows: Ids) -> bool:
        """A row for each document: its first bytes, the separator if there is room, and padding."""
        pieces = self.order.pieces(run.epoch, run.start, run.start + len(rows))
        places = ((piece, ordinal) for piece in pieces for ordinal in range(piece.start, piece.start + piece.length))
        for (piece, ordinal), sequence, row in zip(places, sequences.tolist(), rows, strict=True):
            self._read_document(piece, ordinal, sequence, row)
        return True

    def _read_document(self, piece: Piece, ordinal: int, sequence: int, row: Ids) -> None:
        row[:] = PADDING
        done, ended = 0, False
        block, start = piece.block, -1
        while done < len(row) and not ended:
            content = self._content(
                piece._replace(block=block, last_of_extent=max(block, piece.last_of_extent)), sequence
            )
            if content is None:
                return
            if start < 0:
                start = self._start_of(block, content.ends, ordinal)
            end = bisect_left(content.ends, start + 1)
            ended = end < len(content.ends)
            stop = min(int(content.ends[end]) if ended else len(content.raw), start + len(row) - done)
            row[done : done + stop - start] = content.raw[start:stop]
            for mask in self.masks(block):
                if sequence >= mask.since and mask.start < stop and start < mask.stop:
                    covered = slice(done + max(0, mask.start - start), done + min(stop, mask.stop) - start)
                    row[covered] = PADDING
            done += stop - start
            block, start = block + 1, 0
        if ended and self._separate and done < len(row) and row[done - 1] != PADDING:
            row[done] = SEPARATOR

    def _start_of(self, block: int, ends: NDArray[np.uint32], ordinal: int) -> int:
        """Where the block's document number `ordinal` of those that begin in it begins."""
        lengths = self.corpus.lengths[block]
        inner = int(ends.searchsorted(int(lengths["raw_bytes"])))  # ends that another document follows
        first_begins_here = int(lengths["documents"]) > inner
        if first_begins_here:
            return int(ends[ordinal - 1]) if ordinal else 0
        return int(ends[ordinal])

    def _note_hole(self, block: int, sequence: int, error: CorruptBlockError) -> None:
        with self._lock:
            known = block in self.holes
            if block in self._remembered:
                raise CorruptBlockError(f"{error}; the run read it before sequence {self.holes[block]:,}") from error
            if not known and len(self.holes) >= self._bad_blocks:
                raise CorruptBlockError(f"{error}; data.bad_blocks allows {self._bad_blocks}") from error
            self.holes[block] = min(sequence, self.holes.get(block, sequence))
        if not known:
            log.warning("%s; its bytes are left out of the loss", error)
