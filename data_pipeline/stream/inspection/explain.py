"""Origin of the ids of a sequence: source, shard, block, document and bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipeline.corpus.blocks import DocumentSlice
from data_pipeline.errors import CorruptBlockError
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.documents import Ends, HoleError
from data_pipeline.stream.mixture import Mixture

LOST = DocumentSlice("(a damaged block)", "binary", 0, 0, 0, False, "", None)
"""Slice in place of the documents of a hole."""


@dataclass(frozen=True)
class Origin:
    """Range of a row that comes from one document."""

    start: int
    """Offset of the first id in the row."""
    length: int
    """Number of ids."""
    source: str
    """Name of the source."""
    block: str
    """Name of the block by Corpus.name_of: key, shard and corpus."""
    key: str
    """Key of the document."""
    modality: str
    """Modality of the document."""
    document_start: int
    """Offset of the first byte in the document."""
    masked: bool
    """True if the run did not read it: its block is damaged, or its document was withdrawn."""


def explain(mixture: Mixture, sequence: int) -> list[Origin]:
    """Return the origins of a sequence's bytes, in the order of the row. Separators and padding have none.

    This reads only the few blocks of the row.

    Args:
        mixture: the mixture of the run.
        sequence: number of the sequence.

    Raises:
        CorpusError: a block cannot be read.
    """
    source, number = mixture.place(sequence)
    stream = mixture.streams[source]
    by_document = stream.packing.packing == "document"
    stretches = _of_document(stream, number) if by_document else _of_bytes(stream, number)
    return [
        Origin(
            row,
            length,
            source,
            stream.corpus.name_of(block),
            piece.key,
            piece.modality,
            piece.document_offset + start - piece.start,
            any(m.start <= start < m.stop and number >= m.since for m in stream.masks(block)),
        )
        for row, length, block, piece, start in stretches
    ]


class _Stretch(NamedTuple):
    row: int
    """Offset of the first id in the row."""
    length: int
    block: int
    piece: DocumentSlice
    """Part of the document in the block."""
    start: int
    """Offset of the first byte in the block's content."""


def _of_bytes(stream: ByteStream, sequence: int) -> Iterator[_Stretch]:
    row = 0
    for piece in stream.order.locate(sequence):
        gaps = 0  # number of document ends so far that the stream leaves out
        parts = _slices(stream, piece.block)
        if parts is None:
            yield _Stretch(row, piece.length, piece.block, LOST, 0)
        for part in parts or ():
            begin = part.start - gaps  # in the block as the stream reads it
            first, last = max(begin, piece.start), min(begin + part.length, piece.start + piece.length)
            if first < last:
                yield _Stretch(row + first - piece.start, last - first, piece.block, part, first + gaps)
            gaps += part.ends and not stream.packing.separate_documents
        row += piece.length


def _of_document(stream: ByteStream, sequence: int) -> Iterator[_Stretch]:
    [piece] = stream.order.locate(sequence)
    slices: dict[int, Sequence[DocumentSlice]] = {}

    def ends_of(block: int) -> Ends:
        parts = _slices(stream, block)
        if parts is None:
            raise HoleError(block)
        slices[block] = parts
        return np.array([part.start + part.length for part in parts if part.ends], np.int64)

    row = 0
    try:
        for part in stream.rows.parts(piece.block, piece.start, sequence // stream.sequences_per_epoch, ends_of):
            length = part.stop - part.start - part.has_separator
            if length:
                own = next(s for s in slices[part.block] if s.start <= part.start < s.start + s.length)
                yield _Stretch(row, length, part.block, own, part.start)
            row += length
    except HoleError as hole:  # the stream reads nothing after it
        yield _Stretch(row, stream.sequence_length - row, hole.block, LOST, 0)


def _slices(stream: ByteStream, block: int) -> Sequence[DocumentSlice] | None:
    """Return the parts of documents in a block; None for a hole."""
    try:
        return stream.corpus.read(block).slices
    except CorruptBlockError:
        if block not in stream.holes:
            raise
        return None
