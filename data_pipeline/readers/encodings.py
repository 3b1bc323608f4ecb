"""Conversion of text in UTF-16 and UTF-32 to UTF-8, for readers of lines."""

import codecs
import io
from typing import Any, BinaryIO

from data_pipeline.readers.boundary import check_time
from data_pipeline.sources.opening import STREAM_BYTES

MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Encoding of a file by its byte order mark. The marks of UTF-32 precede those of UTF-16, which they begin with."""


def encoding_of(head: bytes) -> str | None:
    """Return the encoding of a file that begins with these bytes; None without a mark of UTF-16 or UTF-32."""
    return next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), None)


def in_utf8(stream: BinaryIO, keep_mark: bool) -> BinaryIO:
    """Return a stream of text in UTF-8, without the byte order mark of UTF-16 or UTF-32.

    Reading it raises UnicodeDecodeError for bytes that are no text in the encoding of the mark.

    Args:
        stream: the text, at its start. Without such a mark, its bytes do not change.
        keep_mark: keep a byte order mark of UTF-8.
    """
    if not isinstance(stream, io.BufferedReader):
        stream = io.BufferedReader(stream, STREAM_BYTES)  # type: ignore[type-var]
    head = stream.peek(4)[:4]
    if encoding := encoding_of(head):
        return io.BufferedReader(_Converted(stream, encoding), STREAM_BYTES)
    if not keep_mark and head.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


class _Converted(io.RawIOBase):
    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream, self._content = stream, b""
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._is_first, self._is_over = True, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content and not self._is_over:
            self._take()
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _take(self) -> None:
        check_time()
        piece = self._stream.read(STREAM_BYTES)
        self._is_over = not piece
        text = self._decoder.decode(piece, final=not piece)
        if self._is_first:
            text, self._is_first = text.removeprefix("\ufeff"), False
        self._content = text.encode()
