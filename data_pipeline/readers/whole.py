"""Reading of a document that is one file, or one member of a tar."""

from collections.abc import Iterator
from typing import BinaryIO

from byteloom.core.text import count
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.compression import decompressed
from data_pipeline.readers.kinds import reader_of
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.text import read_bytes
from data_pipeline.sources.source_file import LeftOutError


def read_whole(stream: BinaryIO, key: str, name: str, size: int | None, options: ReadOptions) -> Iterator[bytes]:
    """Yield the bytes of the document in a stream, in pieces.

    Args:
        stream: the file or member.
        key: its key, whose suffix decides how it is read.
        name: its name for errors.
        size: size of the stream, if it is known.
        options: how files become documents.

    Raises:
        BadDocumentError: the document is damaged, has another size, or is empty.
    """
    reader, is_compressed = reader_of(key, options)
    expected = None
    if reader.name == "files":
        expected = None if is_compressed else size
        pieces = read_bytes(decompressed(stream, key, name) if is_compressed else stream, name, options, expected)
    else:
        assert reader.read_file is not None, "reader_of returns readers of single documents"
        pieces = reader.read_file(stream, name, options)
    read = 0
    for piece in pieces:
        read += len(piece)
        yield piece
    if expected is not None and read != expected:
        raise BadDocumentError(
            f"{name} changed since it was listed: it had {count(expected, 'byte')} then and has {read:,} now"
        )
    if not read:
        raise LeftOutError("empty", f"{name} is empty")
