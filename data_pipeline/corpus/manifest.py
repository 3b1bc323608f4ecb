"""Manifest of a corpus: its format, its shards, and the digests of its index files and of itself.

    ShardIndex, … ─▶ write_index ─▶ lengths.npy, index.npy, manifest.json ─▶ read_manifest

The raw content decides identity. `content_sha256` is the digest of the blocks' table digests, and the tables hold the
digests of the documents. Another version of zstd changes none of them.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from byteloom.core.files import sync
from data_pipeline.corpus.index import BLOCK, INDEX_FILES, LENGTHS, ShardIndex, blake3_of
from data_pipeline.corpus.storage import Storage
from data_pipeline.errors import CorpusError

SHARD_FORMAT = "byteloom-shards/3"


def read_manifest(storage: Storage) -> dict[str, Any]:
    """Return the manifest of a corpus, and identify the corpus to its storage.

    Raises:
        CorpusError: there is no manifest, it is damaged, or it has another format.
    """
    path = f"{storage.location}/manifest.json"
    storage.check_presence()
    for attempt in range(1, storage.rereads + 1):
        try:
            manifest = _parse(storage.read_small("manifest.json"))
            break
        except ValueError as error:
            if attempt == storage.rereads:
                raise CorpusError(f"{path} is damaged: {error}") from error
    if manifest["format"] != SHARD_FORMAT:
        raise CorpusError(f"{path} has format {manifest['format']!r}; this version reads {SHARD_FORMAT!r}")
    storage.identify(manifest["manifest_sha256"])
    return manifest


def write_index(folder: Path, shards: Iterable[ShardIndex]) -> None:
    """Write lengths.npy, index.npy and manifest.json for the shards in a folder. The manifest is written last.

    Args:
        folder: folder of the corpus.
        shards: indexes of the shards, in order. One is in memory at a time.

    Raises:
        CorpusError: there is no shard.
    """
    entries = list[dict[str, Any]]()
    content = hashlib.sha256()
    with (folder / "lengths.npy").open("wb") as lengths_file, (folder / "index.npy").open("wb") as blocks_file:
        # The header holds the number of records. It is written again, with the same length, when that is known.
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
        "format": SHARD_FORMAT,
        "shards": entries,
        "blocks": count,
        **{name: sum(entry[name] for entry in entries) for name in ("documents", "raw_bytes")},
        "content_sha256": content.hexdigest(),
    }
    for name in INDEX_FILES:
        path = folder / f"{name}.npy"
        manifest |= {f"{name}_bytes": path.stat().st_size, f"{name}_blake3": blake3_of(path)}
    manifest["manifest_sha256"] = _digest(manifest)
    (folder / "manifest.json").write_bytes(_text(manifest))
    for name in ("lengths.npy", "index.npy", "manifest.json"):
        sync(folder / name)
    sync(folder)


def _write_header(file: BinaryIO, dtype: np.dtype[np.void], count: int) -> None:
    """Write the header of a .npy file of version 1.0; NumPy leaves room in it for a growing count."""
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, description)


def _parse(content: bytes) -> dict[str, Any]:
    manifest = json.loads(content.decode())
    if not isinstance(manifest, dict) or manifest.get("manifest_sha256") != _digest(manifest):
        raise ValueError("its digest is not the one it was written with")
    if content != _text(manifest):
        raise ValueError("it has the right content, but not the bytes that were written")
    return manifest


def _text(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
