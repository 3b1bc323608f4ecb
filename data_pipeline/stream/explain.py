"""Where the ids of a sequence come from: source, shard, block, document, bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.corpus.blocks import DocumentSlice
from data_pipeline.errors import CorruptBlockError
from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.mixture import Mixture

LOST = DocumentSlice("(a damaged block)", "binary", 0, 0, 0, False, "", None)
"""Stands for the documents of a hole."""


@dataclass(frozen=True)
class Origin:
    """A stretch of a row, from one place."""

    start: int
    """Of its first id in the row."""
    length: int
    source: str
    block: str
    """As Corpus.name_of calls it: key, shard and corpus."""
    key: str
    """Of the document."""
    modality: str
    document_start: int
    """Of its first byte in the document."""
    masked: bool
    """Whether the run did not read it: a damaged block, or a withdrawn document."""


def explain(mixture: Mixture, sequence: int) -> list[Origin]:
    """Where a sequence's bytes come from, in the order of the row. Separators and padding come from nowhere.

    Reads the few blocks that the row lies in, however long the run.

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
    """Place of its first id in the row."""
    length: int
    block: int
    piece: DocumentSlice
    """The part of a document that it lies in."""
    start: int
    """Of its first byte in the block's content."""


def _of_bytes(stream: ByteStream, sequence: int) -> Iterator[_Stretch]:
    row = 0
    for piece in stream.order.locate(sequence):
        gaps = 0  # document ends so far that are not in the stream
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
    block, row = piece.block, 0
    skip = piece.start  # documents that begin before it in the block
    while row < stream.sequence_length:
        parts = _slices(stream, block)
        if parts is None:  # and nothing after a hole is read
            yield _Stretch(row, stream.sequence_length - row, block, LOST, 0)
            return
        part = [s for s in parts if s.document_offset == 0][skip] if row == 0 else parts[0]
        length = min(part.length, stream.sequence_length - row)
        yield _Stretch(row, length, block, part, part.start)
        row += length
        if part.ends:
            return
        block += 1


def _slices(stream: ByteStream, block: int) -> Sequence[DocumentSlice] | None:
    """The parts of documents in a block; None of a hole."""
    try:
        return stream.corpus.read(block).slices
    except CorruptBlockError:
        if block not in stream.holes:
            raise
        return None
