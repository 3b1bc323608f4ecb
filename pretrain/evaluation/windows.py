"""Windows of documents, each byte scored in one of them.

A window of at most the model's sequence length moves along each document by `stride` bytes. The new bytes at its end
are scored:

    document    ────────────────────────────────────────────────────────
    windows     [new]
                [    |new]
                [         |new]             until it is full, then
                     [         |new]        ...

With a stride of the sequence length, windows do not overlap and no byte has context from an earlier window. A model
that scores only the last N bytes of a window (Perceiver AR) needs a stride of N or less.

A separator may precede the first byte of each document, as in training on concatenated documents. It is in the first
window, and not scored.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.documents import Piece
from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import PADDING, SEPARATOR

if TYPE_CHECKING:  # this file needs no torch
    from pretrain.models.document_entropies import ContextPart


@dataclass(frozen=True)
class ScoredWindow:
    """Bytes of a document that a model reads together, and that are partly scored."""

    key: str
    """Key of the document."""
    modality: str
    ids: Ids
    offset: int
    """Position of the first id in the document; -1 is the separator before it."""
    context: int
    """Number of leading ids that are not scored here: a separator, and what earlier windows have scored."""
    part: "ContextPart | None" = field(default=None, compare=False)
    """Its bytes with those before them, for a model whose patches depend on them; see `EntropyScorer`."""

    @property
    def begins_document(self) -> bool:
        """Whether this window scores the first byte of its document."""
        return self.offset + self.context == 0


def document_windows(
    corpus: Corpus, length: int, stride: int | None = None, *, after_separator: bool = False
) -> Iterator[ScoredWindow]:
    """Yield the windows of each document of a corpus; see `windows_of`. Withdrawn documents are skipped."""
    return windows_of(corpus.pieces(), length, stride, after_separator=after_separator)


def windows_of(
    pieces: Iterable[Piece], length: int, stride: int | None = None, *, after_separator: bool = False
) -> Iterator[ScoredWindow]:
    """Yield the windows of each document in order; the last window scores the bytes that remain.

    Args:
        pieces: the documents in order, each in consecutive pieces.
        length: most bytes of a window.
        stride: bytes scored at the end of a window; `length` if None.
        after_separator: whether a separator precedes each document. Windows of one byte have no room for it.
    """
    stride = stride or length
    before = bytes(1) if after_separator and length > 1 else b""  # the place of the separator
    data, scored = before, len(before)  # of the current document: bytes held, and how many are not to be scored
    for piece in pieces:
        offset = piece.offset - len(data)
        data += piece.content
        while True:
            # A first window of `length` new bytes would have no room for the separator.
            new = min(stride, length - scored) if scored <= len(before) else stride
            begin, end = max(0, scored + new - length), min(scored + new, len(data))
            if len(data) - scored < (1 if piece.ends else new):
                break
            ids = np.frombuffer(data[begin:end], np.uint8).astype(np.int16)
            if offset + begin < 0:
                ids[0] = SEPARATOR
            yield ScoredWindow(piece.key, piece.modality, ids, offset + begin, scored - begin)
            scored = end
        if piece.ends:
            data, scored = before, len(before)
        else:
            data, scored = data[begin:], scored - begin


def padded(windows: Sequence[ScoredWindow]) -> Ids:
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
