"""Decompression of gzip, zstd, xz and bzip2 files, of any number of members, frames or streams.

The stream reader of zstandard takes a file that is cut short for one that has ended. This one raises an error.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import zstandard

from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.boundary import check_time
from data_pipeline.sources.opening import STREAM_BYTES

FEED_BYTES = 4096
"""Compressed bytes that are read at once. zstd makes at most 128 MiB of 4 KiB."""
LONGEST_WINDOW = 1 << 31
"""Largest window of a frame: that of `zstd --long=31`. A frame that states a window needs that much memory."""


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
    begin = _BEGINNINGS.get(key[key.rfind(".") :].lower())
    return stream if begin is None else io.BufferedReader(_Decompressed(stream, name, begin), STREAM_BYTES)


def _begin_gzip() -> _Decompressor:
    return zlib.decompressobj(wbits=31)


def _begin_zstd() -> _Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj()


def _begin_xz() -> _Decompressor:
    return lzma.LZMADecompressor(memlimit=LONGEST_WINDOW)


_BEGINNINGS: dict[str, Callable[[], _Decompressor]] = {
    **dict.fromkeys((".gz", ".tgz"), _begin_gzip),
    ".zst": _begin_zstd,
    **dict.fromkeys((".xz", ".txz"), _begin_xz),
    **dict.fromkeys((".bz2", ".tbz2"), bz2.BZ2Decompressor),
}
"""Decompressor of a member, frame or stream, by the suffix of the file."""


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
        check_time()
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
        except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, ValueError) as error:
            raise BadDocumentError(f"{self._name} cannot be decompressed: {error}") from error
        if frame.eof:
            self._compressed, self._frame = frame.unused_data, None
