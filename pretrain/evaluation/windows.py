"""Windows of documents, each byte scored in one of them.

A window of at most the model's sequence length moves along each document by `stride` bytes. The new bytes at its end
are scored:

    document    ────────────────────────────────────────────────────────
    windows     [new]
                [    |new]
                [         |new]             until it is full, then
                     [         |new]        ...

With a stride of the sequence length, windows do not overlap and no byte has context from an earlier window. A model
that scores only the last N bytes of a window (Perceiver AR) needs a stride of N or less. Separators are not read.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import PADDING

BLOCKS_AHEAD = 7
"""Blocks after the one being read that a request to a remote corpus also brings."""


@dataclass(frozen=True)
class ScoredWindow:
    """Bytes of a document that a model reads together, and that are partly scored."""

    key: str
    """Key of the document."""
    modality: str
    ids: Ids
    offset: int
    """Position of the first id in the document."""
    context: int
    """Number of leading ids that earlier windows have scored."""

    @property
    def begins_document(self) -> bool:
        """Whether this window scores the first byte of its document."""
        return self.offset + self.context == 0


def document_windows(corpus: Corpus, length: int, stride: int | None = None) -> Iterator[ScoredWindow]:
    """Yield the windows of each document in order; the last window scores the bytes that remain.

    Withdrawn documents are skipped.

    Args:
        corpus: the corpus to read.
        length: most bytes of a window.
        stride: bytes scored at the end of a window; `length` if None.
    """
    stride = stride or length
    withdrawn = {entry.key for entry in corpus.withdrawn}
    data, scored = b"", 0  # of the current document: bytes held, and how many are scored
    for number in range(len(corpus)):
        block = corpus.read(number, through=number + BLOCKS_AHEAD)
        for part in block.slices:
            if part.key in withdrawn:
                continue
            offset = part.document_offset - len(data)
            data += block.content[part.start : part.start + part.length]
            while len(data) - scored >= (1 if part.ends else stride):
                begin, end = max(0, scored + stride - length), min(scored + stride, len(data))
                ids = np.frombuffer(data[begin:end], np.uint8).astype(np.int16)
                yield ScoredWindow(part.key, part.modality, ids, offset + begin, scored - begin)
                scored = end
            if part.ends:
                data, scored = b"", 0
            else:
                begin = max(0, scored + stride - length)
                data, scored = data[begin:], scored - begin


def padded(windows: list[ScoredWindow]) -> Ids:
    """Return (rows, T) ids, padded at the end to the longest window."""
    ids = np.full((len(windows), max(len(window.ids) for window in windows)), PADDING, np.int16)
    for row, window in zip(ids, windows, strict=True):
        row[: len(window.ids)] = window.ids
    return ids


def batched(windows: Iterable[ScoredWindow], rows: int) -> Iterator[list[ScoredWindow]]:
    """Yield windows in lists of `rows`; the last list may be shorter."""
    batch: list[ScoredWindow] = []
    for window in windows:
        batch.append(window)
        if len(batch) == rows:
            yield batch
            batch = []
    if batch:
        yield batch
