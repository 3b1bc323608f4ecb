"""Reader of text, code and any other bytes: a document is the content of a file, byte for byte."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import Reader, register_reader
from data_pipeline.readers.streams import pieces_of
from data_pipeline.sources.source_file import LeftOutError


def read_bytes(stream: BinaryIO, name: str, options: ReadOptions, size: int | None = None) -> Iterator[bytes]:
    """Yield the bytes of a stream, in pieces.

    Args:
        stream: the file.
        name: its name for errors.
        options: whether to leave out binary files.
        size: size of the stream, if it is known; a small file then needs no large buffer.

    Raises:
        LeftOutError: with the reason "binary", if the options ask for it and the first piece is not text.
    """
    first = READ_BYTES if size is None else min(size + 1, READ_BYTES)
    piece = stream.read(first)
    if options.skip_binary and is_binary(piece, is_all=len(piece) < first):
        raise LeftOutError("binary", f"{name} is not UTF-8 text")
    while piece:
        yield piece
        piece = stream.read(READ_BYTES)


FILES_READER = register_reader(
    Reader(
        "files",
        "Bytes of each file, unchanged.",
        read_file=read_bytes,
        options=frozenset({"skip_binary"}),
        in_tars=False,
    )
)


def is_binary(piece: bytes, is_all: bool) -> bool:
    """Return whether a file is binary, by its first piece: it has a NUL, which is git's rule, or is not UTF-8.

    Text in older encodings counts as binary.

    Args:
        piece: the first piece.
        is_all: whether the file ends with it; otherwise its last character may be incomplete.
    """
    if 0 in piece:
        return True
    try:
        codecs.getincrementaldecoder("utf-8")().decode(piece, final=is_all)
    except UnicodeDecodeError:
        return True
    return False


def utf8(text: str) -> bytes:
    """Return text as UTF-8. A lone surrogate, which is no character, becomes U+FFFD as Unicode recommends."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def document_in_memory(key: str, modality: str, content: bytes) -> Document:
    """Return a document whose bytes are in memory."""
    return Document(key, modality, lambda: pieces_of(content))
