"""Tar file of a shard: the writer, the reader, and the names in it.

    StoredBlock, … ─▶ ShardWriter ─▶ shard-000000.tar ─▶ ShardReader ─▶ StoredBlock, …

Any tar program and any WebDataset reader opens a shard. The writer is Byteloom's own, because its bytes must depend on
nothing but the shard's number and its blocks: two preparations of a corpus agree to the byte, and a repaired shard has
the digest that the manifest lists. `webdataset.TarWriter` stores the current time, and no tar library returns the
offsets and the digest that the index needs. `tarfile` encodes the one header that is used, with every field fixed.
"""

import hashlib
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from data_pipeline.corpus.blocks import StoredBlock
from data_pipeline.errors import CorpusError

TAR_HEADER = tarfile.BLOCKSIZE
"""Size of a member's header in bytes."""
MEMBERS = ("bytes.zst", "ends", "json.zst")
"""Suffixes of a block's members in the tar, in the order of StoredBlock's fields."""


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.tar"


def number_of_shard(name: str) -> int:
    """Return the number in a shard's file name, the inverse of `shard_name`.

    Raises:
        CorpusError: this is not a shard's name.
    """
    match = re.fullmatch(r"shard-(\d{6,})\.tar", name)
    if match is None:
        raise CorpusError(f"{name} is not the name of a shard, such as {shard_name(42)}")
    return int(match[1])


def block_key(shard: int, ordinal: int) -> str:
    """Return the key of a block: the name of its members, without suffix.

    Args:
        shard: number of the shard.
        ordinal: number of the block in its shard.
    """
    return f"{shard:06d}-{ordinal:06d}"


def member_names(shard: int, ordinal: int) -> list[str]:
    """Return the names of a block's members in the tar."""
    return [f"{block_key(shard, ordinal)}.{suffix}" for suffix in MEMBERS]


def padded(size: int) -> int:
    """Return the bytes that a member of `size` bytes takes up in a tar, without its header."""
    return -(-size // TAR_HEADER) * TAR_HEADER


class ShardWriter:
    """Writer of the tar of a shard. The bytes depend only on the shard's number and the blocks.

    Args:
        file: an empty file that is open for writing.
        number: number of the shard.
    """

    def __init__(self, file: BinaryIO, number: int) -> None:
        self._file = file
        self._number = number
        self._blocks = 0
        self.bytes = 0
        """Bytes written so far."""
        self.sha256 = hashlib.sha256()
        """Digest of the bytes written so far."""

    def add(self, stored: StoredBlock) -> int:
        """Write a block and return the offset of its frame in the tar."""
        offset = self.bytes + TAR_HEADER
        for name, content in zip(member_names(self._number, self._blocks), stored, strict=True):
            self._write(_header(name, len(content)))
            self._write(content)
            self._write(bytes(padded(len(content)) - len(content)))
        self._blocks += 1
        return offset

    def finish(self) -> None:
        """Write the end mark of the tar."""
        self._write(_end_mark(self.bytes))

    def _write(self, part: bytes) -> None:
        self._file.write(part)
        self.sha256.update(part)
        self.bytes += len(part)


class ShardReader:
    """Reader of a tar that `ShardWriter` wrote. It refuses every other tar.

    Args:
        path: path or URL of the file, for error messages.
        file: the file, open for reading at its start.
        progress: called with the number of bytes of each read.
    """

    def __init__(self, path: Path | str, file: BinaryIO, progress: Callable[[int], None]) -> None:
        self._path = path
        self._file = file
        self._progress = progress
        self.begin = 0
        """Offset of the block that was read last."""
        self.bytes = 0
        """Bytes read so far."""
        self.sha256 = hashlib.sha256()
        """Digest of the bytes read so far."""

    def next_block(self, names: Sequence[str]) -> StoredBlock | None:
        """Return the next block; None at the end of the tar.

        Args:
            names: names that the next members must have.

        Raises:
            CorpusError: the tar is damaged here.
        """
        self.begin = self.bytes
        header = self._read(TAR_HEADER)
        if not any(header):
            rest = len(_end_mark(self.begin)) - TAR_HEADER
            if any(self._read(rest)) or self._file.read(1):
                raise self._damaged()
            return None
        return StoredBlock(*(self._content(name, header if name == names[0] else None) for name in names))

    def _content(self, name: str, header: bytes | None) -> bytes:
        header = header or self._read(TAR_HEADER)
        try:
            size = tarfile.TarInfo.frombuf(header, "ascii", "strict").size
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise self._damaged() from error
        if header != _header(name, size):
            raise self._damaged()
        content = self._read(size)
        if any(self._read(padded(size) - size)):
            raise self._damaged()
        return content

    def _read(self, size: int) -> bytes:
        content = self._file.read(size)
        self.bytes += len(content)
        self.sha256.update(content)
        self._progress(len(content))
        if len(content) != size:
            raise CorpusError(f"{self._path} is damaged: it ends before byte {self.bytes - len(content) + size:,}")
        return content

    def _damaged(self) -> CorpusError:
        return CorpusError(f"{self._path} is damaged between its blocks, at byte {self.bytes:,} or before")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, "byteloom", "byteloom"
    return info.tobuf(tarfile.USTAR_FORMAT)


def _end_mark(size: int) -> bytes:
    """Return the zeros that end a tar of `size` bytes: at least two tar blocks, up to a whole record."""
    end = size + 2 * tarfile.BLOCKSIZE
    return bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - size)
