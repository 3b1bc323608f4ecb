"""One file, or one member of a tar, that is one document."""

from collections.abc import Iterator
from typing import BinaryIO

from byteloom.core.text import count
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.compression import decompressed
from data_pipeline.readers.kinds import whole_of
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.text import read_bytes
from data_pipeline.sources.source_file import LeftOutError


def read_whole(stream: BinaryIO, key: str, name: str, size: int | None, options: ReadOptions) -> Iterator[bytes]:
    """The bytes of the document that a stream holds, in pieces.

    Args:
        key: its suffix says what the stream is.
        name: what errors call it.
        size: bytes that the stream should have, if that is known.
    Raises:
        BadDocumentError: it is damaged, has another size, or makes a document without a byte.
    """
    expected = None
    match whole_of(key, options):
        case "image":
            from data_pipeline.readers.images import read_image  # noqa: PLC0415 - Pillow, for those who have images

            pieces = read_image(stream, name, options)
        case "audio":
            from data_pipeline.readers.audio import read_audio  # noqa: PLC0415 - its libraries, for those who have sound

            pieces = read_audio(stream, name, options)
        case "compressed":
            pieces = read_bytes(decompressed(stream, key, name), name, options)
        case "bytes":
            pieces, expected = read_bytes(stream, name, options, size), size
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
