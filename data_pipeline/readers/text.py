"""Text, code and any other bytes: a document is what the file holds, byte for byte."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.streams import pieces_of
from data_pipeline.sources.source_file import LeftOutError


def read_bytes(stream: BinaryIO, name: str, options: ReadOptions, size: int | None = None) -> Iterator[bytes]:
    """The bytes of a stream, in pieces.

    Args:
        size: of the stream, if that is known: then a small one is not given a large buffer.
    Raises:
        LeftOutError: for "binary", if that is asked for and the first piece is not text.
    """
    first = READ_BYTES if size is None else min(size + 1, READ_BYTES)
    piece = stream.read(first)
    if options.skip_binary and is_binary(piece, is_all=len(piece) < first):
        raise LeftOutError("binary", f"{name} is not UTF-8 text")
    while piece:
        yield piece
        piece = stream.read(READ_BYTES)


def is_binary(piece: bytes, is_all: bool) -> bool:
    """Whether a file's first piece holds a NUL, as git judges, or is not UTF-8. Text of older encodings is binary.

    Args:
        is_all: whether the file ends with it; a character may be cut in two at the end of another piece.
    """
    if 0 in piece:
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(piece, final=is_all)
    except UnicodeDecodeError:
        return True
    return False


def utf8(text: str) -> bytes:
    """Text as UTF-8. A lone surrogate, which is no character, becomes U+FFFD as Unicode recommends."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def document_in_memory(key: str, modality: str, content: bytes) -> Document:
    """A document of bytes that are in memory already."""
    return Document(key, modality, lambda: pieces_of(content))
