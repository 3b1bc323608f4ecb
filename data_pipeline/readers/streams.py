"""Copies of streams that can only be read once, for libraries that need to seek or to open a file."""

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO, cast

from data_pipeline.documents import READ_BYTES

IN_MEMORY_BYTES = 8 << 20
"""Size limit of a copy in memory. Larger copies are kept in the folder for temporary files."""


def pieces_of(content: bytes | memoryview) -> Iterator[bytes]:
    """Yield bytes in memory as the pieces of a document."""
    for start in range(0, len(content), READ_BYTES):
        yield bytes(content[start : start + READ_BYTES])


def copy_of(stream: IO[bytes]) -> BinaryIO:
    """Return a copy of the rest of a stream, which can be read in any order. The caller closes it."""
    copy = cast(BinaryIO, tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES))  # noqa: SIM115 - the caller closes it
    shutil.copyfileobj(stream, copy, READ_BYTES)
    copy.seek(0)
    return copy


@contextmanager
def seekable(stream: BinaryIO) -> Iterator[BinaryIO]:
    """Yield the stream if it can be read in any order, else a copy."""
    if stream.seekable():
        yield stream
    else:
        with copy_of(stream) as copy:
            yield copy


@contextmanager
def on_disk(stream: BinaryIO) -> Iterator[int]:
    """Yield the descriptor of a file of this machine with the content of the stream, at its start."""
    try:
        descriptor = stream.fileno()
        stream.flush()
    except io.UnsupportedOperation:
        with copy_of(stream) as copy, on_disk(copy) as descriptor:
            yield descriptor
    else:
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
