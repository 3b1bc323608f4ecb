"""What readers of media need of a stream that can only be read from its beginning to its end."""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO, cast

from data_pipeline.documents import READ_BYTES

IN_MEMORY_BYTES = 8 << 20
"""Copies of streams that are larger are kept on disk, in the folder for temporary files."""


def pieces_of(content: bytes | memoryview) -> Iterator[bytes]:
    """Bytes in memory, as a document's pieces."""
    for start in range(0, len(content), READ_BYTES):
        yield bytes(content[start : start + READ_BYTES])


def copy_of(stream: IO[bytes]) -> BinaryIO:
    """All that a stream still holds, where it can be read in any order. To be closed."""
    copy = cast(BinaryIO, tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES))  # noqa: SIM115 - the caller closes it
    shutil.copyfileobj(stream, copy, READ_BYTES)
    copy.seek(0)
    return copy


@contextmanager
def seekable(stream: BinaryIO) -> Iterator[BinaryIO]:
    """The stream if it can be read in any order, else a copy."""
    if stream.seekable():
        yield stream
    else:
        with copy_of(stream) as copy:
            yield copy


@contextmanager
def on_disk(stream: BinaryIO) -> Iterator[int]:
    """A descriptor of a file of this machine that holds what the stream does, at its beginning."""
    try:
        descriptor = stream.fileno()
        stream.flush()
    except io.UnsupportedOperation:
        with copy_of(stream) as copy, on_disk(copy) as descriptor:
            yield descriptor
    else:
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
