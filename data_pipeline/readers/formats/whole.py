"""Reading of a document that is one file, or one member of a tar."""

from collections.abc import Generator, Iterator
from typing import BinaryIO

from byteloom.core.text import count
from data_pipeline.documents import Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.media import MediaCard
from data_pipeline.readers.boundary import guarded
from data_pipeline.readers.compression import decompressed
from data_pipeline.readers.content import refuse_other_kind, settle_modality
from data_pipeline.readers.formats.text import read_bytes
from data_pipeline.readers.kinds import reader_of
from data_pipeline.readers.options import ReadOptions
from data_pipeline.sources.source_file import LeftOutError


def read_whole(
    stream: BinaryIO, document: Document, name: str, size: int | None, options: ReadOptions
) -> Iterator[bytes]:
    """Yield the bytes of the document in a stream, in pieces.

    Args:
        stream: the file or member.
        document: the document. The suffix of its key decides how it is read; its modality may be corrected.
            Its `media` is set at the end.
        name: its name for errors.
        size: size of the stream, if it is known.
        options: how files become documents.

    Raises:
        BadDocumentError: the document is damaged, has another size, is empty, or is of another kind.
    """
    reader, is_compressed = reader_of(document.key, options)
    is_plain = reader.name == "files"
    expected = None
    if is_plain:
        expected = None if is_compressed else size
        source = decompressed(stream, document.key, name) if is_compressed else stream
        pieces = read_bytes(source, name, options, expected)
    else:
        refuse_other_kind(document, name, options)
        assert reader.read_file is not None, "reader_of returns readers of single documents"
        pieces = reader.read_file(stream, name, options)
    read = 0
    found = _Found(guarded(pieces, name))
    for piece in found:
        if is_plain and not read:
            settle_modality(document, piece, name, options)
        read += len(piece)
        yield piece
    document.media = found.card
    if expected is not None and read != expected:
        raise BadDocumentError(
            f"{name} changed since it was listed: it had {count(expected, 'byte')} then and has {read:,} now"
        )
    if not read:
        raise LeftOutError("empty", f"{name} is empty")


class _Found:
    """Pieces of a reader, and the card that it returns."""

    card: MediaCard | None = None

    def __init__(self, pieces: Generator[bytes, None, MediaCard | None]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        self.card = yield from self._pieces
