"""Shards: plain tars of blocks, and the manifest and index that find every block without opening a tar.

    corpus/
        manifest.json         format, totals, the shards, digests of the index files and of itself
        lengths.npy           for each block (LENGTHS) what the stream's order depends on
        index.npy             for each block (BLOCK) where it lies and its digests
        shard-000000.tar      000000-000000.bytes.zst, 000000-000000.ends, 000000-000000.json.zst, 000000-000001.…

    blocks ─▶ write_shard ─▶ ShardIndex, … ─▶ write_index ─▶ manifest.json, lengths.npy, index.npy
                                              Corpus ◀─────┘

Any tar program and any WebDataset reader opens a shard; `zstd -d` opens a block. The raw content decides identity:
`content_sha256` is the digest of the digests of the blocks' tables, which have those of the documents, so another zstd
changes nothing.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import blake3
import numpy as np
import zstandard
from numpy.typing import NDArray

from byteloom.core.files import move_into_place, partial_path, sync
from data_pipeline.corpus.blocks import ENDS, Block, StoredBlock, decode, decompress, encode, seal
from data_pipeline.corpus.storage import Folder, RemoteConfig, Storage, open_storage
from data_pipeline.corpus.withdrawn import Withdrawal, read_withdrawn
from data_pipeline.documents import MODALITIES
from data_pipeline.errors import CorpusError, CorruptBlockError

T = TypeVar("T")

FORMAT = "byteloom-shards/3"
TAR_HEADER = tarfile.BLOCKSIZE
MEMBERS = ("bytes.zst", "ends", "json.zst")
"""Suffixes of a block's members in the tar, in the order of StoredBlock's fields."""
INDEX_FILES = ("lengths", "index")
HASHED_AT_ONCE = 4 << 20
SPAN_BYTES = 16 << 20
"""Adjacent blocks are read from afar with one request of this size, at most."""

LENGTHS = np.dtype(
    [
        ("raw_bytes", "<u4"),  # of documents; its content has a byte more for each that ends here
        ("documents", "<u4"),  # that begin here
        ("document_ends", "<u4"),  # documents that end here
    ]
)
BLOCK = np.dtype(
    [
        ("shard", "<u4"),  # its place in the manifest's list
        ("frame_bytes", "<u4"),  # of the zstd frame of the content
        ("frame_offset", "<u8"),  # of its first byte in the tar; the other members follow
        ("table_bytes", "<u4"),  # of the zstd frame of the table
        ("modalities", "<u4"),  # a bit each
        ("content_sha256", "u1", (32,)),  # Block.digest
        ("stored_blake3", "u1", (32,)),  # blocks.seal of the frame and the ends
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """What the manifest and the index say of one shard."""

    entry: dict[str, Any]
    """name; blocks, documents and raw_bytes in it; bytes and sha256 of the tar."""
    lengths: NDArray[np.void]
    blocks: NDArray[np.void]
    """With shard 0: `write_index` numbers them."""

    def save(self, path: Path) -> None:
        """Writes a file that `load` reads; it is there whole or not at all."""
        staging = partial_path(path)
        with staging.open("wb") as file:
            entry = np.frombuffer(json.dumps(self.entry).encode(), np.uint8)
            np.savez(file, entry=entry, lengths=self.lengths, blocks=self.blocks)
        move_into_place(staging, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path, allow_pickle=False) as file:
            return cls(json.loads(file["entry"].tobytes()), file["lengths"], file["blocks"])


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def number_of_shard(name: str) -> int:
    """The inverse of `shard_name`. Raises CorpusError."""
    match = re.fullmatch(r"shard-(\d{6,})\.tar", name)
    if match is None:
        raise CorpusError(f"{name} is not the name of a shard, such as {shard_name(42)}")
    return int(match[1])


def write_shard(folder: Path, number: int, blocks: Iterable[Block], level: int) -> ShardIndex | None:
    """Writes blocks as one shard, which is there whole or not at all; None, and no file, when there is no block.

    Args:
        level: zstd compression level.
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


class ShardWriter:
    """Stored blocks to the tar of a shard, whose bytes depend on its number and on the blocks' alone."""

    def __init__(self, file: BinaryIO, number: int) -> None:
        self._file = file
        self._number = number
        self._blocks = 0
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def add(self, stored: StoredBlock) -> int:
        """Writes a block; returns the offset of its frame."""
        offset = self.bytes + TAR_HEADER
        for name, content in zip(_member_names(self._number, self._blocks), stored, strict=True):
            self._write(_tar_header(name, len(content)))
            self._write(content)
            self._write(bytes(_padded(len(content)) - len(content)))
        self._blocks += 1
        return offset

    def finish(self) -> None:
        self._write(_tar_end(self.bytes))

    def _write(self, part: bytes) -> None:
        self._file.write(part)
        self.sha256.update(part)
        self.bytes += len(part)


def _member_names(shard: int, ordinal: int) -> list[str]:
    return [f"{_block_key(shard, ordinal)}.{suffix}" for suffix in MEMBERS]


def _block_key(shard: int, ordinal: int) -> str:
    return f"{shard:06d}-{ordinal:06d}"


def _tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = size, 0o444, "byteloom", "byteloom"
    return info.tobuf(tarfile.USTAR_FORMAT)


def _tar_end(size: int) -> bytes:
    """What ends a tar of `size` bytes: two empty blocks at least, up to a whole record."""
    end = size + 2 * tarfile.BLOCKSIZE
    return bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - size)


def _padded(size: int) -> int:
    return -(-size // TAR_HEADER) * TAR_HEADER


def scan_shard(path: Path, progress: Callable[[int], None]) -> ShardIndex:
    """The index of a shard, from the shard alone: every byte of it is read and checked. Holds one block in memory.

    Args:
        progress: called with numbers of bytes that have been read.

    Raises:
        CorruptBlockError: a block is damaged.
        CorpusError: it cannot be read, or is not, to the byte, what `write_shard` writes.
    """
    number = number_of_shard(path.name)
    rows = list[tuple[Any, Any]]()
    try:
        with path.open("rb") as file:
            tar = _TarReader(path, file, progress)
            while stored := tar.next_block(_member_names(number, len(rows))):
                offset = tar.begin + TAR_HEADER
                try:
                    block = decode(stored)  # no index says its digest; its table says its documents'
                except CorruptBlockError as error:
                    key = _block_key(number, len(rows))
                    raise CorruptBlockError(f"block {key} of {path} is damaged: {error}") from error
                rows.append(_index_rows(block, stored, offset))
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    if not rows:
        raise CorpusError(f"{path} has no blocks")
    return _shard_index(path.name, rows, tar.bytes, tar.sha256.hexdigest())


class _TarReader:
    """Reads a tar as `ShardWriter` writes it, and refuses any other."""

    def __init__(self, path: Path, file: BinaryIO, progress: Callable[[int], None]) -> None:
        self._path = path
        self._file = file
        self._progress = progress
        self.begin = 0
        """Where the members that were read last begin."""
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def next_block(self, names: Sequence[str]) -> StoredBlock | None:
        """The contents of the next members, which must have these names; None at the end of the tar."""
        self.begin = self.bytes
        header = self._read(TAR_HEADER)
        if not any(header):
            rest = len(_tar_end(self.begin)) - TAR_HEADER
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
        if header != _tar_header(name, size):
            raise self._damaged()
        content = self._read(size)
        if any(self._read(_padded(size) - size)):
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


def write_index(folder: Path, shards: Iterable[ShardIndex]) -> None:
    """Writes manifest.json, lengths.npy and index.npy of the shards in a folder, in the order given.

    Holds one shard's index in memory. The manifest comes last.

    Raises:
        CorpusError: there is no shard.
    """
    entries = list[dict[str, Any]]()
    content = hashlib.sha256()
    with (folder / "lengths.npy").open("wb") as lengths_file, (folder / "index.npy").open("wb") as blocks_file:
        # The header says how many records follow: it is written again, of the same length, when that is known.
        for file, dtype in ((lengths_file, LENGTHS), (blocks_file, BLOCK)):
            _write_header(file, dtype, 0)
        for number, shard in enumerate(shards):
            blocks = shard.blocks.copy()
            blocks["shard"] = number
            lengths_file.write(shard.lengths.tobytes())
            blocks_file.write(blocks.tobytes())
            content.update(blocks["content_sha256"].tobytes())
            entries.append(shard.entry)
        if not entries:
            raise CorpusError("the corpus is empty: all its documents are empty")
        count = sum(entry["blocks"] for entry in entries)
        for file, dtype in ((lengths_file, LENGTHS), (blocks_file, BLOCK)):
            file.seek(0)
            _write_header(file, dtype, count)
    manifest = {
        "format": FORMAT,
        "shards": entries,
        "blocks": count,
        **{name: sum(entry[name] for entry in entries) for name in ("documents", "raw_bytes")},
        "content_sha256": content.hexdigest(),
    }
    for name in INDEX_FILES:
        path = folder / f"{name}.npy"
        manifest |= {f"{name}_bytes": path.stat().st_size, f"{name}_blake3": blake3_of(path)}
    manifest["manifest_sha256"] = _manifest_digest(manifest)
    (folder / "manifest.json").write_bytes(_manifest_text(manifest))
    for name in ("lengths.npy", "index.npy", "manifest.json"):
        sync(folder / name)
    sync(folder)


def _write_header(file: BinaryIO, dtype: np.dtype[np.void], count: int) -> None:
    """The header of a .npy file of version 1.0; NumPy leaves room in it for a growing count."""
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, description)


class Corpus:
    """A written corpus: its manifest, its index, and its blocks, each verified when read.

    Safe to read from many threads. Opening costs a read of the index files; memory is theirs, mapped.

    Args:
        location: a folder, or a URL that fsspec opens (https://host/corpus, s3://bucket/corpus).
        check_shards: refuse a folder in which a shard is missing or has another length than it was written with.
            Shards at a URL are met as they are read.
        remote: how shards at a URL are fetched.

    Raises:
        CorpusError: there is no corpus, or its manifest or index is damaged.
    """

    def __init__(self, location: str | Path, check_shards: bool = True, remote: RemoteConfig | None = None) -> None:
        self.storage = open_storage(location, remote or RemoteConfig())
        self.location = self.storage.location
        with ExitStack() as on_failure:
            on_failure.callback(self.storage.close)
            self.manifest = read_manifest(self.storage)
            self.lengths = open_index_file(self.storage, self.manifest, "lengths")
            self.index = open_index_file(self.storage, self.manifest, "index")
            if check_shards and isinstance(self.storage, Folder):
                _check_sizes(self.storage, self.manifest)
            on_failure.pop_all()
        self._shard_names = [shard["name"] for shard in self.manifest["shards"]]

    @property
    def content_sha256(self) -> str:
        """Identity of the raw content, in order."""
        return str(self.manifest["content_sha256"])

    @property
    def raw_bytes(self) -> int:
        return int(self.manifest["raw_bytes"])

    @property
    def modalities(self) -> list[str]:
        """What kinds of documents there are."""
        found = {name for shard in self.manifest["shards"] for name in shard["modalities"]}
        return [name for name in MODALITIES if name in found]

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.index)

    @cached_property
    def first_blocks(self) -> NDArray[np.int64]:
        """The number of each shard's first block."""
        counts = [shard["blocks"] for shard in self.manifest["shards"]]
        return np.concatenate([[0], np.cumsum(counts[:-1], dtype=np.int64)])

    @cached_property
    def withdrawn(self) -> list[Withdrawal]:
        """Documents that are not to be read any more, as the list stood at the first look.

        Raises:
            CorpusError: the list cannot be read, is damaged, or is another corpus's.
        """
        return read_withdrawn(self.storage, self.content_sha256, self.lengths)

    def blocks_of(self, shard: int) -> range:
        """The blocks of a shard, which is named by its place in the manifest."""
        first = int(self.first_blocks[shard])
        return range(first, first + int(self.manifest["shards"][shard]["blocks"]))

    def read_content(self, block: int, through: int | None = None) -> tuple[bytes, NDArray[np.uint32]]:
        """What a training run reads of block number `block`: its content, and where documents end in it.

        Args:
            through: last of the blocks after this one that will be wanted soon. From afar they come with it.

        Raises:
            CorruptBlockError: its bytes are not those that were written.
            CorpusError: its shard cannot be read.
        """
        seal_of_index = self.index[block]["stored_blake3"].tobytes()

        def checked(members: list[memoryview]) -> tuple[bytes, NDArray[np.uint32]]:
            frame, ends = members
            if seal(frame, ends) != seal_of_index:
                raise CorruptBlockError("its digest is not the one in the index")
            return decompress(frame), np.frombuffer(ends, ENDS)

        return self._read(block, through, 2, checked)

    def read(self, block: int, through: int | None = None) -> Block:
        """Block number `block` of the corpus, with its table.

        Args:
            through: last of the blocks after this one that will be wanted soon. From afar they come with it.

        Raises:
            CorruptBlockError: its bytes are not those that were written.
            CorpusError: its shard cannot be read.
        """
        return self._read(block, through, 3, lambda members: self._decoded(block, members)[1])

    def read_stored(self, block: int, through: int | None = None) -> StoredBlock:
        """As `read`, the block as it lies in its shard. Its frame and ends are those that were written to the byte."""
        return self._read(block, through, 3, lambda members: self._decoded(block, members)[0])

    def _decoded(self, block: int, members: list[memoryview]) -> tuple[StoredBlock, Block]:
        record = self.index[block]
        stored = StoredBlock(*map(bytes, members))
        if seal(stored.frame, stored.ends) != record["stored_blake3"].tobytes():
            raise CorruptBlockError("its digest is not the one in the index")
        return stored, decode(stored, record["content_sha256"].tobytes())

    def _read(self, block: int, through: int | None, count: int, checked: Callable[[list[memoryview]], T]) -> T:
        """What `checked` makes of the first `count` members of a block. Wrong bytes from afar are fetched anew."""
        record = self.index[block]
        begin, name = int(record["frame_offset"]), self._shard_names[record["shard"]]
        spans = self.members(block)[:count]
        ahead = self._span_end(block, block if through is None else through)
        for attempt in range(1, self.storage.rereads + 1):
            try:
                span = memoryview(self.storage.read_ahead(name, begin, begin + spans[-1][1], ahead, attempt > 1))
                return checked([span[start:end] for start, end in spans])
            except CorruptBlockError as error:
                if attempt == self.storage.rereads:
                    raise type(error)(f"{self.name_of(block)} is damaged: {error}") from error
        raise AssertionError("a last attempt returns or raises")

    def members(self, block: int) -> list[tuple[int, int]]:
        """Begin and end of each member of a block, counted from its frame."""
        record = self.index[block]
        ends_bytes = int(self.lengths[block]["document_ends"]) * ENDS.itemsize
        spans, begin = [], 0
        for size in (int(record["frame_bytes"]), ends_bytes, int(record["table_bytes"])):
            spans.append((begin, begin + size))
            begin += _padded(size) + TAR_HEADER
        return spans

    def _span_end(self, block: int, through: int) -> int:
        """Where a request ends that begins at `block` and brings the blocks up to `through` of its shard, if it may."""
        begin = int(self.index[block]["frame_offset"])
        last = max(block, min(through, self.blocks_of(int(self.index[block]["shard"]))[-1]))
        while True:
            end = int(self.index[last]["frame_offset"]) + self.members(last)[-1][1]
            if last == block or end - begin <= SPAN_BYTES:
                return end
            last = (block + last) // 2

    def name_of(self, block: int) -> str:
        """What to call a block when there is something to say of it: its key in its shard."""
        shard = int(self.index[block]["shard"])
        name = self._shard_names[shard]
        key = _block_key(number_of_shard(name), block - self.blocks_of(shard)[0])
        return f"block {key} of {self.location}/{name}"

    def close(self) -> None:
        self.storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_manifest(storage: Storage) -> dict[str, Any]:
    """The manifest of a corpus.

    Raises:
        CorpusError: there is none, it is damaged, or it is of another format.
    """
    path = f"{storage.location}/manifest.json"
    if isinstance(storage, Folder):
        if not storage.path.is_dir():
            raise CorpusError(f"there is no corpus at {storage.path}: no such folder (byteloom prepare makes one)")
        if not (storage.path / "manifest.json").exists():
            raise CorpusError(f"{storage.path} is not a corpus: it has no manifest.json (byteloom prepare writes it)")
    for attempt in range(1, storage.rereads + 1):
        try:
            manifest = _parse_manifest(storage.read_small("manifest.json"))
            break
        except ValueError as error:
            if attempt == storage.rereads:
                raise CorpusError(f"{path} is damaged: {error}") from error
    if manifest["format"] != FORMAT:
        raise CorpusError(f"{path} has format {manifest['format']!r}; this version reads {FORMAT!r}")
    storage.identify(manifest["manifest_sha256"])
    return manifest


def _parse_manifest(content: bytes) -> dict[str, Any]:
    manifest = json.loads(content.decode())
    if not isinstance(manifest, dict) or manifest.get("manifest_sha256") != _manifest_digest(manifest):
        raise ValueError("its digest is not the one it was written with")
    if content != _manifest_text(manifest):
        raise ValueError("it has the right content, but not the bytes that were written")
    return manifest


def _manifest_text(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _check_sizes(folder: Folder, manifest: dict[str, Any]) -> None:
    for shard in manifest["shards"]:
        if (found := folder.size(shard["name"])) != shard["bytes"]:
            path = f"{folder.location}/{shard['name']}"
            raise CorpusError(f"{path} has {found:,} bytes, but was written with {shard['bytes']:,}")


def open_index_file(storage: Storage, manifest: dict[str, Any], name: str) -> NDArray[np.void]:
    """lengths.npy or index.npy, mapped, when it has the digest of the manifest.

    Raises:
        CorpusError: it has not, or cannot be read.
    """
    file, digest = f"{name}.npy", manifest[f"{name}_blake3"]
    for attempt in range(1, storage.rereads + 1):
        path = storage.local_copy(file, manifest[f"{name}_bytes"], digest, attempt > 1)
        if blake3_of(path) == digest:
            # A plain array: each access to a memmap costs as much as ten to it.
            return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    raise CorpusError(
        f"{storage.location}/{file} is damaged: its digest is not the one in manifest.json; "
        f"byteloom verify --repair {storage.location} writes it again from the shards"
    )


def _manifest_digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def blake3_of(path: Path) -> str:
    """Digest of a file, at some GB/s: an index of ten million blocks has one.

    Raises:
        CorpusError: it cannot be read.
    """
    digest = blake3.blake3(max_threads=blake3.blake3.AUTO)
    piece = memoryview(bytearray(HASHED_AT_ONCE))  # reads into it, for pages of a mapping would count as ours
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(piece):
                digest.update(piece[:size])
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
