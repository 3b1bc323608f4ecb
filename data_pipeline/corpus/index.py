"""Index of a corpus: place and digests of every block.

    lengths.npy           for each block (LENGTHS) the lengths that decide the stream's order
    index.npy             for each block (BLOCK) its place in a shard and its digests

    blocks ─▶ write_shard ─▶ shard-000000.tar, ShardIndex ─▶ manifest.write_index
                             shard-000000.tar ─▶ scan_shard ─▶ ShardIndex

A ShardIndex is the part of the index that one shard has. It is made from the blocks, or from the tar alone.
"""

import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import blake3
import numpy as np
import zstandard
from numpy.lib import format as npy
from numpy.typing import NDArray

from byteloom.core.storage.files import move_into_place, partial_path
from data_pipeline.corpus.blocks import Block, StoredBlock, decode, encode, seal
from data_pipeline.corpus.tar import (
    TAR_HEADER,
    ShardReader,
    ShardWriter,
    block_key,
    member_names,
    number_of_shard,
    shard_name,
)
from data_pipeline.documents import MODALITIES
from data_pipeline.errors import CorpusError, CorruptBlockError, DamagedCorpusError

if TYPE_CHECKING:  # workers of prepare, which read no corpus, start faster
    from data_pipeline.corpus.storage.storage import Storage

INDEX_FILES = ("lengths", "index")
"""Names of the index files, without `.npy`."""
HASHED_AT_ONCE = 4 << 20
"""Bytes that are read and hashed at once."""
MAX_HEADER_BYTES = 1 << 16
"""Bytes of an .npy file that hold its header."""

LENGTHS = np.dtype(
    [
        ("raw_bytes", "<u4"),  # bytes of documents; the content has one more for each document that ends here
        ("documents", "<u4"),  # documents that begin here
        ("document_ends", "<u4"),  # documents that end here
    ]
)
BLOCK = np.dtype(
    [
        ("shard", "<u4"),  # position of its shard in the manifest's list
        ("frame_bytes", "<u4"),  # size of the zstd frame of the content
        ("frame_offset", "<u8"),  # offset of that frame in the tar; the other members follow
        ("table_bytes", "<u4"),  # size of the zstd frame of the table
        ("modalities", "<u4"),  # one bit for each
        ("content_sha256", "u1", (32,)),  # Block.digest
        ("stored_blake3", "u1", (32,)),  # blocks.seal of the frame and the ends
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """Manifest entry and index records of one shard."""

    entry: dict[str, Any]
    """Name; blocks, documents and raw_bytes; bytes and sha256 of the tar."""
    lengths: NDArray[np.void]
    """(blocks,) LENGTHS."""
    blocks: NDArray[np.void]
    """(blocks,) BLOCK, with shard 0; `write_index` sets the shard."""

    def save(self, path: Path) -> None:
        """Write a file that `load` reads; it is complete or absent."""
        staging = partial_path(path)
        with staging.open("wb") as file:
            entry = np.frombuffer(json.dumps(self.entry).encode(), np.uint8)
            np.savez(file, entry=entry, lengths=self.lengths, blocks=self.blocks)
        move_into_place(staging, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the index that `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(json.loads(file["entry"].tobytes()), file["lengths"], file["blocks"])


def write_shard(folder: Path, number: int, blocks: Iterable[Block], level: int) -> ShardIndex | None:
    """Write blocks as one shard, which is complete or absent.

    Args:
        folder: folder of the shard.
        number: number of the shard, which names it.
        blocks: the blocks, in order.
        level: zstd compression level.

    Returns:
        The shard's index; None, and no file, if there is no block.
    """
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
    path = folder / shard_name(number)
    staging = partial_path(path)
    rows = []
    with staging.open("wb") as file:
        shard = ShardWriter(file, number)
        for block in blocks:
            stored = encode(block, compressor)
            rows.append(_index_rows(block, stored, shard.add(stored)))
        shard.finish()
    if not rows:
        staging.unlink()
        return None
    move_into_place(staging, path)
    return _shard_index(path.name, rows, shard.bytes, shard.sha256.hexdigest())


def scan_shard(path: Path, progress: Callable[[int], None]) -> ShardIndex:
    """Return the index of a shard on this machine. See `scan_tar`."""
    try:
        with path.open("rb") as file:
            return scan_tar(path, file, progress)
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error


def scan_tar(path: Path | str, file: BinaryIO, progress: Callable[[int], None]) -> ShardIndex:
    """Return the index of a shard, made from its tar alone. Every byte is read and checked; one block is in memory.

    Args:
        path: path or URL of the tar, whose last part names the shard.
        file: the tar, open for reading at its start.
        progress: called with the number of bytes of each read.

    Raises:
        CorruptBlockError: a block is damaged.
        CorpusError: the tar cannot be read, or differs from what `write_shard` writes.
    """
    name = PurePosixPath(path).name
    number = number_of_shard(name)
    rows = list[tuple[Any, Any]]()
    tar = ShardReader(path, file, progress)
    while stored := tar.next_block(member_names(number, len(rows))):
        offset = tar.begin + TAR_HEADER
        try:
            block = decode(stored)  # no index gives its digest; its table has the digests of its documents
        except CorruptBlockError as error:
            key = block_key(number, len(rows))
            raise CorruptBlockError(f"block {key} of {path} is damaged: {error}") from error
        rows.append(_index_rows(block, stored, offset))
    if not rows:
        raise CorpusError(f"{path} has no blocks")
    return _shard_index(name, rows, tar.bytes, tar.sha256.hexdigest())


def _index_rows(block: Block, stored: StoredBlock, frame_offset: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    lengths = (block.raw_bytes, block.documents, len(block.ends))
    digests = (np.frombuffer(d, np.uint8) for d in (block.digest, seal(stored.frame, stored.ends)))
    return lengths, (0, len(stored.frame), frame_offset, len(stored.table), block.modalities, *digests)


def _shard_index(name: str, rows: Sequence[tuple[Any, Any]], size: int, sha256: str) -> ShardIndex:
    lengths = np.array([row[0] for row in rows], LENGTHS)
    blocks = np.array([row[1] for row in rows], BLOCK)
    modalities = int(np.bitwise_or.reduce(blocks["modalities"]))
    entry = {
        "name": name,
        "blocks": len(rows),
        "documents": int(lengths["documents"].sum(dtype=np.int64)),
        "raw_bytes": int(lengths["raw_bytes"].sum(dtype=np.int64)),
        "modalities": [name for bit, name in enumerate(MODALITIES) if modalities >> bit & 1],
        "bytes": size,
        "sha256": sha256,
    }
    return ShardIndex(entry, lengths, blocks)


def open_index_file(storage: "Storage", manifest: dict[str, Any], name: str) -> NDArray[np.void]:
    """Return an index file, in memory, after a check of its digest.

    A mapping of the file would end the process with SIGBUS if the file were truncated later, and it could show other
    records than those whose digest was checked. In memory, both files take 100 bytes a block in each process: 0.1 GB
    for a corpus of 1 TB.

    Args:
        storage: files of the corpus.
        manifest: manifest of the corpus.
        name: one of INDEX_FILES.

    Raises:
        CorpusError: the file cannot be read, or its digest is not the one in the manifest.
    """
    file, digest = f"{name}.npy", manifest[f"{name}_blake3"]
    for attempt in range(1, storage.rereads + 1):
        content = storage.read_index(file, manifest[f"{name}_bytes"], digest, attempt > 1)
        if blake3.blake3(content, max_threads=blake3.blake3.AUTO).hexdigest() == digest:
            return _array_in(content)
    raise DamagedCorpusError(
        f"{storage.location}/{file} is damaged: its digest is not the one in manifest.json; "
        f"byteloom verify --repair {storage.location} writes it again from the shards"
    )


def _array_in(content: bytes | bytearray) -> NDArray[np.void]:
    """Return the array that the bytes of an .npy file hold, without a copy. Bytes after it are ignored."""
    file = io.BytesIO(content[:MAX_HEADER_BYTES])
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
    shape, _, dtype = read_header(file)
    array = np.frombuffer(content, dtype, count=math.prod(shape), offset=file.tell()).reshape(shape)
    array.flags.writeable = False
    return array


def blake3_of(path: Path) -> str:
    """Return the digest of a file, in hexadecimal. An index of ten million blocks is hashed at some GB/s.

    Raises:
        CorpusError: the file cannot be read.
    """
    digest = blake3.blake3(max_threads=blake3.blake3.AUTO)
    piece = memoryview(bytearray(HASHED_AT_ONCE))
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(piece):
                digest.update(piece[:size])
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
