"""The stream: training sequence number g of a run, for any g, as a function of the corpus and a few numbers.

    epoch, k = divmod(g, sequences_per_epoch)
    lane, position = k % lanes, k // lanes
    start = (lane * sequences_per_lane + position) * sequence_length     # in the epoch's permuted blocks
    a binary search over prefix sums finds the block and the offset in it

An epoch is the corpus with its extents (a few adjacent blocks) permuted, cut into `lanes` equal segments that are read
side by side. No rank, worker or batch size appears, so the data state of a run is one integer, and a run goes on
exactly on any number of processes. With as many lanes as rows in a batch, row j of the next batch continues row j.
"""

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from data_pipeline.errors import CorpusError, CorruptBlockError
from data_pipeline.shards import Corpus
from data_pipeline.vocabulary import PADDING, SEPARATOR

log = logging.getLogger(__name__)

EXTENT_BYTES = 4 << 20
"""Adjacent blocks are permuted together in groups of about this many raw bytes."""
ORDER_VERSION = 1
"""Goes up if the order of a run's bytes ever changes; part of the fingerprint."""

Ids = NDArray[np.int16]


class StreamConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What a run reads, and in which order."""

    shards: str
    """Folder that `byteloom prepare` wrote, with manifest.json in it."""
    separate_documents: bool = True
    """Put id 256 after each document, so that the model learns where documents end. Off for media of fixed size."""
    lanes: int = Field(default=128, ge=1)
    """Places of the corpus that are read side by side; with at least as many as a global batch has rows, its rows are
    strangers. Memory of the loader: two blocks (of 1 MiB as a rule) a lane, at most."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Changes the order of the corpus in every epoch."""
    bad_blocks: int = Field(default=0, ge=0)
    """Damaged blocks that a run may meet before it stops. Each is a hole: its bytes are padding, count in no loss, and
    nothing after them moves."""


class Piece(NamedTuple):
    """A range of one block's stream: its bytes, with separators counted where the stream has them."""

    block: int
    start: int
    length: int


@dataclass(frozen=True)
class _Epoch:
    blocks: NDArray[np.int64]
    """Block numbers in this epoch's order."""
    starts: NDArray[np.int64]
    """Where each of them begins in the epoch's stream; one longer than `blocks`."""


class ByteStream:
    """`stream[g]` is training sequence number g: (sequence_length,) ids. A pure function; safe from many threads.

    Raises:
        CorpusError: the corpus is shorter than one sequence.
    """

    def __init__(self, corpus: Corpus, config: StreamConfig, sequence_length: int) -> None:
        self.corpus = corpus
        self.sequence_length = sequence_length
        self._config = config
        index = corpus.index
        self._lengths = index["raw_bytes"].astype(np.int64)
        if config.separate_documents:
            self._lengths += index["document_ends"]
        self._extent_of_block = _extents(index["raw_bytes"])
        sequences = int(self._lengths.sum()) // sequence_length
        if sequences == 0:
            raise CorpusError(
                f"{corpus.folder} has {corpus.raw_bytes:,} bytes, less than one sequence of {sequence_length:,}"
            )
        self.lanes = min(config.lanes, sequences)
        self.sequences_per_lane = sequences // self.lanes
        self.sequences_per_epoch = self.sequences_per_lane * self.lanes
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[int, tuple[NDArray[np.uint8], NDArray[np.int64]]] = OrderedDict()
        self._lock = threading.Lock()
        self.holes: set[int] = set()
        """Damaged blocks met so far."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything the order and content of the stream depend on."""
        identity = {
            "order": ORDER_VERSION,
            "content_sha256": self.corpus.content_sha256,
            "sequence_length": self.sequence_length,
            "separate_documents": self._config.separate_documents,
            "lanes": self._config.lanes,
            "seed": self._config.seed,
            "extent_bytes": EXTENT_BYTES,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def __getitem__(self, sequence: int) -> Ids:
        """Training sequence number `sequence`: (sequence_length,) int16 ids, 0..255 and SEPARATOR; PADDING in holes.

        Raises:
            CorpusError: a block it needs is damaged, and more have been than the config allows.
        """
        return np.concatenate([self._ids(piece) for piece in self.locate(sequence)])

    def locate(self, sequence: int) -> list[Piece]:
        """Where training sequence number `sequence` lies, without reading it."""
        epoch_number, k = divmod(sequence, self.sequences_per_epoch)
        lane, position = k % self.lanes, k // self.lanes
        start = (lane * self.sequences_per_lane + position) * self.sequence_length
        end = start + self.sequence_length
        epoch = self._epoch(epoch_number)
        pieces = []
        slot = int(np.searchsorted(epoch.starts, start, side="right")) - 1
        while start < end:
            stop = min(end, int(epoch.starts[slot + 1]))
            if stop > start:
                pieces.append(Piece(int(epoch.blocks[slot]), start - int(epoch.starts[slot]), stop - start))
            start = stop
            slot += 1
        return pieces

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._epochs:
                extents = int(self._extent_of_block[-1]) + 1
                rank_of_extent = np.empty(extents, np.int64)
                rank_of_extent[permutation(extents, self._config.seed, number)] = np.arange(extents)
                blocks = np.argsort(rank_of_extent[self._extent_of_block], kind="stable")
                starts = np.concatenate([[0], np.cumsum(self._lengths[blocks])])
                self._epochs[number] = _Epoch(blocks, starts)
                while len(self._epochs) > 2:  # loaders look ahead over one border at most
                    self._epochs.popitem(last=False)
            return self._epochs[number]

    def _ids(self, piece: Piece) -> Ids:
        block = self._block(piece.block)
        if block is None:
            return np.full(piece.length, PADDING, np.int16)
        raw, ends = block
        if not self._config.separate_documents:
            return raw[piece.start : piece.start + piece.length].astype(np.int16)
        separators = ends + np.arange(len(ends))
        first, last = np.searchsorted(separators, [piece.start, piece.start + piece.length])
        begin = piece.start - first
        ids = raw[begin : piece.start + piece.length - last].astype(np.int16)
        return np.insert(ids, ends[first:last] - begin, SEPARATOR)

    def _block(self, number: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
        """A block's bytes and document ends; None where there is a hole.

        Two blocks a lane are kept: while some lanes have gone on to their next block, others still read their last.
        """
        with self._lock:
            if number in self.holes:
                return None
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
        try:
            block = self.corpus.read(number)  # two threads may read one block at once; both read the same
        except CorruptBlockError as error:
            self._note_hole(number, error)
            return None
        entry = (np.frombuffer(block.raw, np.uint8), np.array(block.document_ends, np.int64))
        with self._lock:
            self._blocks[number] = entry
            while len(self._blocks) > 2 * self.lanes:
                self._blocks.popitem(last=False)
        return entry

    def _note_hole(self, number: int, error: CorruptBlockError) -> None:
        with self._lock:
            if number in self.holes:
                return
            if len(self.holes) >= self._config.bad_blocks:
                raise CorruptBlockError(f"{error}; data.bad_blocks allows {self._config.bad_blocks}") from error
            self.holes.add(number)
        log.warning("%s; its bytes are left out of the loss", error)


def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of `count` things in an epoch: the argsort of SplitMix64 of their numbers.

    Pinned by a golden test: no library's random generator is asked, so no upgrade can reorder a run.
    """
    base = _splitmix64(_splitmix64(np.array([seed], np.uint64)) + np.uint64(epoch))
    keys = _splitmix64(base + np.arange(count, dtype=np.uint64))
    return np.argsort(keys, kind="stable")


def _splitmix64(state: NDArray[Any]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014) on uint64, elementwise, modulo 2**64."""
    z = state + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _extents(raw_bytes: NDArray[np.uint32]) -> NDArray[np.int64]:
    """The extent each block belongs to, numbered 0, 1, … along the corpus.

    It depends on raw bytes alone: where shards begin is a matter of compression.
    """
    ends = np.cumsum(raw_bytes, dtype=np.int64)
    return np.unique((ends - raw_bytes) // EXTENT_BYTES, return_inverse=True)[1]
