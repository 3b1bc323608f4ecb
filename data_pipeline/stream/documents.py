"""Rows of documents, for a stream in which each row belongs to one document.

    Piece (block, number of the row among the block's) ─▶ document ─▶ Parts: ranges of blocks' contents

A block has the rows of the documents that begin in it. A long document continues in the next blocks. How it becomes
rows is a pure function of the corpus, the epoch and the seed:

    cut      one row, its first T bytes
    crop     one row, T bytes from a place that differs from epoch to epoch
    split    as many rows of T bytes as it needs; where documents end must then be known of every block
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.order import random_number

LongDocuments = Literal["cut", "split", "crop"]
"""Treatment of a document that is longer than a row."""
Ends = NDArray[np.int64]
"""Offsets in a block's content of the bytes 0 that follow documents."""
NO_ENDS: Ends = np.empty(0, np.int64)
FIRST_CROP = 1 << 60
"""Key of the crop of the first document of block 0."""
MOST_DOCUMENTS = 1 << 24
"""Keys that each block has for its documents."""
THREADS = 16
"""Threads that read where documents end."""


class HoleError(Exception):
    """A row continues in a block that cannot be read.

    Args:
        block: number of the block.
    """

    def __init__(self, block: int) -> None:
        super().__init__(f"block {block} cannot be read")
        self.block = block


class Part(NamedTuple):
    """Range of a block's content that a row has."""

    block: int
    """Number of the block."""
    start: int
    """First offset in the content."""
    stop: int
    """Offset after the last."""
    has_separator: bool
    """True if the last byte is the 0 after the document, which stands for a separator."""


class DocumentRows:
    """Rows of the documents of a corpus.

    Args:
        lengths: the corpus's.
        sequence_length: T, the ids of a row.
        separate: whether a separator follows a document if its row has room.
        long_documents: how a document that is longer than a row becomes rows.
        seed: seed of the crops.
    """

    def __init__(
        self, lengths: NDArray[np.void], sequence_length: int, separate: bool, long_documents: LongDocuments, seed: int
    ) -> None:
        self._lengths = lengths
        self._row = sequence_length
        self._separate = separate
        self._long_documents = long_documents
        self._seed = seed

    def parts(self, block: int, number: int, epoch: int, ends_of: Callable[[int], Ends]) -> Iterator[Part]:
        """Yield the parts of a row, in order.

        Args:
            block: block in which the document begins.
            number: number of the row among those of the block.
            epoch: epoch of the row.
            ends_of: where documents end in a block's content. What it raises ends the row.
        """
        ends = ends_of(block)
        ordinal, skipped = self._document_of(block, number, ends)
        start = self._begin(block, ends, ordinal)
        if self._long_documents == "crop":
            spare = self._length(block, start, ends, ends_of) + self._separate - self._row
            key = FIRST_CROP + block * MOST_DOCUMENTS + ordinal
            skipped = random_number(self._seed, epoch, key) % (spare + 1) if spare > 0 else 0
        yield from self._walk(block, start, skipped, ends_of)

    def _walk(self, block: int, start: int, skipped: int, ends_of: Callable[[int], Ends]) -> Iterator[Part]:
        """Yield the parts of a row of the document that begins at an offset, without its first `skipped` bytes."""
        room = self._row
        while room:
            size = int(self._lengths[block]["raw_bytes"])
            if not self._lengths[block]["document_ends"] and skipped >= size - start:
                block, start, skipped = block + 1, 0, skipped - (size - start)
                continue
            ends = ends_of(block)
            index = int(ends.searchsorted(start))
            is_last = index < len(ends)
            stop = int(ends[index]) if is_last else size + len(ends)
            begin = min(start + skipped, stop)
            end = min(stop, begin + room)
            has_separator = is_last and self._separate and end == stop and end - begin < room
            if end + has_separator > begin:
                yield Part(block, begin, end + has_separator, has_separator)
            room -= end + has_separator - begin
            if is_last:
                return
            block, start, skipped = block + 1, 0, skipped - (begin - start)

    def _document_of(self, block: int, number: int, ends: Ends) -> tuple[int, int]:
        """Return the document of a row, as its number in the block, and how many bytes come before the row in it."""
        if self._long_documents != "split":
            return number, 0
        before = np.cumsum(rows_of_documents(self._complete(block, ends), self._row))
        ordinal = int(before.searchsorted(number, "right"))
        return ordinal, (number - int(before[ordinal - 1] if ordinal else 0)) * self._row

    def _complete(self, block: int, ends: Ends) -> NDArray[np.int64]:
        """Return the lengths of the documents that begin and end in a block."""
        first = self._first(block, ends)
        begins = np.concatenate([[0], ends + 1])[first : len(ends)]
        return ends[first:] - begins

    def _first(self, block: int, ends: Ends) -> int:
        """Return 1 if the block begins within a document, else 0."""
        lengths = self._lengths[block]
        last = int(lengths["raw_bytes"]) + len(ends) - 1
        inner = int(ends.searchsorted(last))  # number of ends that are followed by another document
        return int(int(lengths["documents"]) <= inner)

    def _begin(self, block: int, ends: Ends, ordinal: int) -> int:
        """Return the offset of the document with a number among those that begin in a block."""
        index = ordinal + self._first(block, ends)
        return int(ends[index - 1]) + 1 if index else 0

    def _length(self, block: int, start: int, ends: Ends, ends_of: Callable[[int], Ends]) -> int:
        """Return the bytes of the document that begins at an offset of a block."""
        length = 0
        while True:
            index = int(ends.searchsorted(start))
            if index < len(ends):
                return length + int(ends[index]) - start
            length += int(self._lengths[block]["raw_bytes"]) + len(ends) - start
            block, start = block + 1, 0
            ends = ends_of(block) if self._lengths[block]["document_ends"] else NO_ENDS

    def document_lengths(self, blocks: range, ends_of: Callable[[int], Ends]) -> list[NDArray[np.int64]]:
        """Return, for each of these blocks, the lengths of the documents that begin in it."""
        found = []
        for block in blocks:
            ends = ends_of(block) if self._lengths[block]["document_ends"] else NO_ENDS
            lengths = self._complete(block, ends)
            if len(lengths) < self._lengths[block]["documents"]:  # the last one continues
                lengths = np.append(lengths, self._length(block, self._begin(block, ends, len(lengths)), ends, ends_of))
            found.append(lengths)
        return found


def rows_of_documents(lengths: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
    """Return the rows that documents of these lengths need if they are split."""
    return np.maximum(1, -(-lengths // sequence_length))


def read_rows_of_blocks(corpus: Corpus, sequence_length: int) -> NDArray[np.int64]:
    """Return how many rows the documents that begin in each block need if they are split.

    This reads where documents end in each block: a few bytes, and for a corpus at a URL a request, a block.

    Raises:
        CorpusError: they cannot be read.
    """
    rows = DocumentRows(corpus.lengths, sequence_length, False, "split", 0)
    with ThreadPoolExecutor(THREADS) as pool:
        ends = list(pool.map(corpus.read_ends, range(len(corpus))))
    lengths = rows.document_lengths(range(len(corpus)), ends.__getitem__)
    return np.array([rows_of_documents(each, sequence_length).sum() for each in lengths], np.int64)
