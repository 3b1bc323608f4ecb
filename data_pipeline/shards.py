"""Shards: plain tars of blocks, and the manifest and index that find every block without opening a tar.

    corpus/
        manifest.json         format, totals, the shards, digests of the index and of itself
        index.npy             one record a block (BLOCK_RECORD), in corpus order
        shard-000000.tar      000000.bytes.zst, 000000.json, 000001.bytes.zst, …

Any tar program and any WebDataset reader opens a shard; `zstd -d` opens a block. The raw content decides identity:
`content_sha256` is the digest of the digests of the blocks' raw bytes and tables, so another zstd changes nothing.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
import webdataset
import zstandard
from numpy.typing import NDArray

from data_pipeline.blocks import Block, Seal, decode, encode
from data_pipeline.errors import CorpusError, CorruptBlockError

FORMAT = "byteloom-shards/1"
TAR_HEADER = 512

BLOCK_RECORD = np.dtype(
    [
        ("shard", "<u4"),
        ("frame_offset", "<u8"),  # of the zstd frame's first byte in the tar
        ("frame_bytes", "<u4"),
        ("table_offset", "<u8"),
        ("table_bytes", "<u4"),
        ("raw_bytes", "<u4"),
        ("documents", "<u4"),  # documents that begin here
        ("document_ends", "<u4"),  # documents that end here
        ("sha256", "u1", (32,)),  # of the raw bytes
        ("table_sha256", "u1", (32,)),  # of the JSON table
    ]
)


class CorpusWriter:
    """Writes blocks into shards in a folder, and index and manifest when closed.

    Args:
        folder: where to write; made if it is not there.
        shard_bytes: a shard is closed once its tar is at least this long.
        level: zstd compression level.
    """

    def __init__(self, folder: Path, shard_bytes: int, level: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
        self._records: list[tuple[Any, ...]] = []
        self._shards: list[dict[str, Any]] = []
        self._tar: webdataset.TarWriter | None = None

    def add(self, block: Block) -> None:
        tar = self._tar or self._open_shard()
        frame, table = encode(block, self._compressor)
        frame_offset = tar.tarstream.offset + TAR_HEADER
        tar.write({"__key__": f"{len(self._records):06d}", "bytes.zst": frame, "json": table})
        self._records.append(
            (
                len(self._shards) - 1,
                frame_offset,
                len(frame),
                frame_offset + _padded(len(frame)) + TAR_HEADER,
                len(table),
                len(block.raw),
                sum(s.document_offset == 0 for s in block.slices),
                len(block.document_ends),
                np.frombuffer(block.digest, np.uint8),
                np.frombuffer(hashlib.sha256(table).digest(), np.uint8),
            )
        )
        shard = self._shards[-1]
        shard["blocks"] += 1
        shard["raw_bytes"] += len(block.raw)
        if tar.tarstream.offset >= self.shard_bytes:
            self._close_shard()

    def close(self) -> None:
        """Writes index and manifest.

        Raises:
            CorpusError: no block was added.
        """
        if not self._records:
            raise CorpusError("the corpus is empty: no document holds a byte")
        self._close_shard()
        index = np.array(self._records, dtype=BLOCK_RECORD)
        np.save(self.folder / "index.npy", index, allow_pickle=False)
        manifest = {
            "format": FORMAT,
            "shards": self._shards,
            "blocks": len(index),
            "documents": int(index["documents"].sum()),
            "raw_bytes": int(index["raw_bytes"].sum()),
            "content_sha256": _content_digest(index),
            "index_sha256": sha256_of(self.folder / "index.npy"),
        }
        manifest["manifest_sha256"] = _manifest_digest(manifest)
        (self.folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def _open_shard(self) -> webdataset.TarWriter:
        name = f"shard-{len(self._shards):06d}.tar"
        self._file = (self.folder / name).open("wb")
        self._tar = webdataset.TarWriter(
            self._file, user="byteloom", group="byteloom", mtime=0, encoder=False, compress=False
        )
        self._shards.append({"name": name, "blocks": 0, "raw_bytes": 0})
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            path = Path(self._file.name)
            self._shards[-1] |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            self._tar = None


class Corpus:
    """A written corpus: its manifest, its index, and its blocks, each verified when read.

    Safe to read from many threads.

    Args:
        check_shards: refuse a corpus of which a shard is missing or has another length than it was written with.

    Raises:
        CorpusError: the folder is not a corpus, or its manifest or index is damaged.
    """

    def __init__(self, folder: Path, check_shards: bool = True) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        index_path = folder / "index.npy"
        try:
            index_sha256 = sha256_of(index_path)
        except OSError as error:
            raise CorpusError(f"{index_path} cannot be read: {error.strerror}") from error
        if index_sha256 != self.manifest["index_sha256"]:
            raise CorpusError(f"{index_path} is damaged: its digest is not the one in manifest.json")
        self.index = np.load(index_path, mmap_mode="r", allow_pickle=False)
        self._shard_names = [shard["name"] for shard in self.manifest["shards"]]
        self._descriptors: dict[int, int] = {}
        if check_shards:
            for shard in self.manifest["shards"]:
                self._check_length(folder / shard["name"], shard["bytes"])

    @staticmethod
    def _check_length(path: Path, length: int) -> None:
        try:
            found = path.stat().st_size
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
        if found != length:
            raise CorpusError(f"{path} has {found:,} bytes; it was written with {length:,}")

    @property
    def content_sha256(self) -> str:
        """Identity of the raw content, in order."""
        return str(self.manifest["content_sha256"])

    @property
    def raw_bytes(self) -> int:
        return int(self.manifest["raw_bytes"])

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.index)

    def read(self, block: int) -> Block:
        """Block number `block` of the corpus.

        Raises:
            CorruptBlockError: its bytes are not those that were written.
            CorpusError: its shard cannot be read.
        """
        record = self.index[block]
        shard = int(record["shard"])
        begin = int(record["frame_offset"])
        end = int(record["table_offset"]) + int(record["table_bytes"])
        try:
            span = os.pread(self._descriptor(shard), end - begin, begin)
        except OSError as error:
            raise CorpusError(f"{self.name_of(block)} cannot be read: {error.strerror}") from error
        frame = span[: int(record["frame_bytes"])]
        table = span[int(record["table_offset"]) - begin :]
        seal = Seal(int(record["raw_bytes"]), record["sha256"].tobytes(), record["table_sha256"].tobytes())
        try:
            return decode(frame, table, seal)
        except CorruptBlockError as error:
            raise CorruptBlockError(f"{self.name_of(block)} is damaged: {error}") from error

    def name_of(self, block: int) -> str:
        """What to call a block when there is something to say of it."""
        return f"block {block:06d} of {self.folder / self._shard_names[int(self.index[block]['shard'])]}"

    def _descriptor(self, shard: int) -> int:
        # pread needs no position, so threads share one descriptor; dict.setdefault settles a race of two openers.
        if shard not in self._descriptors:
            path = self.folder / self._shard_names[shard]
            try:
                opened = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CorpusError(f"{path} cannot be read: {error.strerror}") from error
            if self._descriptors.setdefault(shard, opened) != opened:
                os.close(opened)
        return self._descriptors[shard]

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise CorpusError(f"no corpus at {folder}: there is no such folder (byteloom prepare makes one)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CorpusError(f"{folder} is not a corpus: it has no manifest.json (byteloom prepare writes it)") from error
    except ValueError as error:
        raise CorpusError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("manifest_sha256") != _manifest_digest(manifest):
        raise CorpusError(f"{path} is damaged: it does not have the digest it was written with")
    if manifest["format"] != FORMAT:
        raise CorpusError(f"{path} has format {manifest['format']!r}; this version reads {FORMAT!r}")
    return manifest


def _content_digest(index: NDArray[np.void]) -> str:
    digests = np.concatenate([index["sha256"], index["table_sha256"]], axis=1)
    return hashlib.sha256(digests.tobytes()).hexdigest()


def _manifest_digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _padded(size: int) -> int:
    return -(-size // TAR_HEADER) * TAR_HEADER
