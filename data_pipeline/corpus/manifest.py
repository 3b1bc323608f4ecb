"""Manifest of a corpus: its format, its shards, and the digests of its index files and of itself.

    ShardIndex, … ─▶ write_index ─▶ lengths.npy, index.npy, manifest.json ─▶ read_manifest

The raw content decides identity. `content_sha256` is the digest of the blocks' table digests, and the tables hold the
digests of the documents. Another version of zstd changes none of them.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from byteloom.core.storage.files import sync
from data_pipeline.corpus.index import BLOCK, INDEX_FILES, LENGTHS, ShardIndex, blake3_of
from data_pipeline.corpus.tar import number_of_shard
from data_pipeline.errors import CorpusError, DamagedCorpusError
from data_pipeline.media import CARD_FIELD, MediaCard

if TYPE_CHECKING:  # workers of prepare, which read no corpus, start faster
    from data_pipeline.corpus.storage.storage import Storage

SHARD_FORMAT = "byteloom-shards/3"

FIELDS: dict[str, type] = {
    **{"format": str, "shards": list, "blocks": int, "documents": int, "raw_bytes": int, "content_sha256": str},
    **{"lengths_bytes": int, "lengths_blake3": str, "index_bytes": int, "index_blake3": str, "manifest_sha256": str},
}
"""Fields of a manifest. The manifest of a corpus of media has CARD_FIELD, too."""
SHARD_FIELDS: dict[str, type] = {
    **{"name": str, "blocks": int, "documents": int, "raw_bytes": int, "modalities": list, "bytes": int, "sha256": str},
}
"""Fields of a shard's entry in a manifest."""


def read_manifest(storage: "Storage") -> dict[str, Any]:
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
                raise DamagedCorpusError(f"{path} is damaged: {error}") from error
    if manifest["format"] != SHARD_FORMAT:
        raise CorpusError(f"{path} has format {manifest['format']!r}; this version reads {SHARD_FORMAT!r}")
    _check_fields(manifest, path)
    storage.identify(manifest["manifest_sha256"])
    return manifest


def write_index(folder: Path, shards: Iterable[ShardIndex], card: MediaCard | None = None) -> None:
    """Write lengths.npy, index.npy and manifest.json for the shards in a folder. The manifest is written last.

    Args:
        folder: folder of the corpus.
        shards: indexes of the shards, in order. One is in memory at a time.
        card: layout of all documents, if they are media.

    Raises:
        CorpusError: there is no shard.
    """
    entries = list[dict[str, Any]]()
    content = hashlib.sha256()
    with (folder / "lengths.npy").open("wb") as lengths_file, (folder / "index.npy").open("wb") as blocks_file:
        # The header holds the number of records. It is written again, with the same length, when that is known.
        for file, name in ((lengths_file, "lengths"), (blocks_file, "index")):
            file.write(index_header(name, 0))
        for number, shard in enumerate(shards):
            blocks = shard.blocks.copy()
            blocks["shard"] = number
            lengths_file.write(shard.lengths.tobytes())
            blocks_file.write(blocks.tobytes())
            content.update(blocks["content_sha256"].tobytes())
            entries.append(shard.entry)
        if not entries:
            raise CorpusError("the corpus is empty: no document has a byte")
        manifest = fields_of_shards(entries, content.hexdigest())
        if card is not None:
            manifest[CARD_FIELD] = card.as_json()
        for file, name in ((lengths_file, "lengths"), (blocks_file, "index")):
            file.seek(0)
            file.write(index_header(name, manifest["blocks"]))
    for name in INDEX_FILES:
        path = folder / f"{name}.npy"
        manifest |= {f"{name}_bytes": path.stat().st_size, f"{name}_blake3": blake3_of(path)}
    manifest["manifest_sha256"] = _digest(manifest)
    (folder / "manifest.json").write_bytes(_text(manifest))
    for name in ("lengths.npy", "index.npy", "manifest.json"):
        sync(folder / name)
    sync(folder)


def fields_of_shards(entries: Sequence[dict[str, Any]], content_sha256: str) -> dict[str, Any]:
    """Return the fields of a manifest that follow from its shards."""
    totals = {name: sum(entry[name] for entry in entries) for name in ("blocks", "documents", "raw_bytes")}
    return {"format": SHARD_FORMAT, "shards": list(entries), **totals, "content_sha256": content_sha256}


def index_header(name: str, count: int) -> bytes:
    """Return the header of an index file of `count` records: .npy version 1.0, with room for a growing count."""
    dtype = LENGTHS if name == "lengths" else BLOCK
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def card_of(manifest: Mapping[str, Any]) -> MediaCard | None:
    """Return the card of a manifest; None if it has none.

    Raises:
        ValueError: the card is damaged.
    """
    return MediaCard.from_json(manifest[CARD_FIELD]) if CARD_FIELD in manifest else None


def digest_with_card(manifest: Mapping[str, Any], card: MediaCard | None) -> str:
    """Return the digest that a manifest would have with a card, or without one."""
    own = {name: value for name, value in manifest.items() if name != CARD_FIELD}
    return _digest(own if card is None else {**own, CARD_FIELD: card.as_json()})


def _check_fields(manifest: dict[str, Any], path: str) -> None:
    """Check that a manifest has its fields, each of its type, and that its shards are named as shards.

    Raises:
        CorpusError: it does not.
    """
    entries = manifest.get("shards")
    tables = [(manifest, FIELDS, "")]
    if isinstance(entries, list):
        tables += [(entry, SHARD_FIELDS, f" of shard {number}") for number, entry in enumerate(entries)]
    for fields, kinds, whose in tables:
        for name, kind in kinds.items():
            value = fields.get(name) if isinstance(fields, dict) else None
            if type(value) is not kind or (isinstance(value, int) and value < 0):
                raise DamagedCorpusError(
                    f"{path} is damaged: its field {name}{whose} is {value!r}, not {_in_words(kind)}"
                )
    try:
        card_of(manifest)
    except ValueError as error:
        raise DamagedCorpusError(f"{path} is damaged: {error}") from error
    for entry in manifest["shards"]:
        number_of_shard(entry["name"])
    if not manifest["shards"]:
        raise DamagedCorpusError(f"{path} is damaged: it lists no shard")


def _in_words(kind: type) -> str:
    return {int: "a whole number of at least 0", str: "text"}.get(kind, "a list")


def _parse(content: bytes) -> dict[str, Any]:
    manifest = json.loads(content.decode())
    if not isinstance(manifest, dict) or manifest.get("manifest_sha256") != _digest(manifest):
        raise ValueError("its digest is not the one it was written with")
    if content != _text(manifest):
        raise ValueError("it has the right content, but not the bytes that were written")
    return manifest


def _text(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
