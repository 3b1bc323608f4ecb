"""Decompression of gzip and zstd files, of any number of members or frames.

The stream reader of zstandard takes a file that is cut short for one that has ended. This one raises an error.
"""

import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import zstandard

from data_pipeline.errors import BadDocumentError
from data_pipeline.sources.opening import STREAM_BYTES

FEED_BYTES = 4096
"""Compressed bytes that are read at once. zstd makes at most 128 MiB of 4 KiB."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def decompressed(stream: BinaryIO, key: str, name: str) -> BinaryIO:
    """Return a decompressed stream; the stream itself if the key's suffix names no compression.

    Reading it raises BadDocumentError for bytes that are damaged or cut short.

    Args:
        stream: the compressed bytes.
        key: key of the file, whose suffix names the compression.
        name: name of the file for errors.
    """
    if key.lower().endswith((".gz", ".tgz")):
        return io.BufferedReader(_Decompressed(stream, name, lambda: zlib.decompressobj(wbits=31)), STREAM_BYTES)
    if key.lower().endswith(".zst"):
        decompressor = zstandard.ZstdDecompressor()
        return io.BufferedReader(_Decompressed(stream, name, decompressor.decompressobj), STREAM_BYTES)
    return stream


class _Decompressed(io.RawIOBase):
    def __init__(self, stream: BinaryIO, name: str, begin: Callable[[], _Decompressor]) -> None:
        self._stream, self._name, self._begin = stream, name, begin
        self._frame: _Decompressor | None = None  # the frame that has begun
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content and self._take():
            pass
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _take(self) -> bool:
        """Decompress a little more. Return False at the end."""
        data = self._compressed or self._stream.read(FEED_BYTES)
        self._compressed = b""
        if not data:
            if self._frame is not None:
                raise BadDocumentError(f"{self._name} is cut short: the end of its compressed data is missing")
            return False
        if self._frame is None:
            data = data.lstrip(b"\0")  # padding to the blocks of a tape; no frame begins with a zero
            self._frame = self._begin() if data else None
        if self._frame is not None:
            self._decompress(self._frame, data)
        return True

    def _decompress(self, frame: _Decompressor, data: bytes) -> None:
        try:
            self._content = memoryview(frame.decompress(data))
        except (zlib.error, zstandard.ZstdError) as error:
            raise BadDocumentError(f"{self._name} cannot be decompressed: {error}") from error
        if frame.eof:
            self._compressed, self._frame = frame.unused_data, None
