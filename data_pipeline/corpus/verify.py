"""Verify that every byte of a corpus is what was written, and that manifest and index say what the shards hold.

    shard-000000.tar, … ─▶ scan ─▶ ShardIndex, … ─▶ Comparison ◀─ manifest.json, lengths.npy, index.npy

Every shard is read and indexed again. The result is compared with each field of the manifest and each record of the
index. Every changed, missing or added byte is found, with one exception: a deleted list of withdrawn documents. The
blocks of a damaged shard are read one by one to name the damaged ones. A corpus that was replaced as a whole is found
by its digest, which a recipe can pin (data.shards_sha256).
"""

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import blake3
import numpy as np
from numpy.typing import NDArray

from byteloom.core.progress import Progress, Tally
from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.entropies import open_entropies
from data_pipeline.corpus.index import INDEX_FILES, ShardIndex, open_index_file, scan_shard, scan_tar
from data_pipeline.corpus.manifest import FIELDS, SHARD_FIELDS, fields_of_shards, index_header, read_manifest
from data_pipeline.corpus.storage.remote import PIECE_BYTES, RemoteConfig
from data_pipeline.corpus.storage.storage import Storage, open_storage
from data_pipeline.corpus.tar import number_of_shard, shard_name
from data_pipeline.corpus.withdrawn import read_withdrawn
from data_pipeline.errors import CorpusError, CorruptBlockError, ShardEndsError
from data_pipeline.media import CARD_FIELD


def verify(location: str | Path, threads: int, progress: Progress, remote: RemoteConfig | None = None) -> list[str]:
    """Return a message for every fault of a corpus; none if it is intact.

    Each thread holds a piece of 8 MiB, a block, and the index of a shard in memory.

    Args:
        location: a folder or a URL.
        threads: number of shards that are read at once.
        progress: called with bytes done and in all.
        remote: how shards at a URL are fetched.
    """
    try:
        corpus = Corpus(location, check_shards=False, remote=remote)
    except CorpusError:
        return _faults_without_index(location, threads, progress, remote)
    with corpus:
        entries = corpus.manifest["shards"]
        comparison = Comparison(corpus.location, corpus.manifest, {"lengths": corpus.lengths, "index": corpus.index})
        entropies, closed = open_entropies(corpus)
        in_all = sum(shard["bytes"] for shard in entries) + sum(stored.size for stored in entropies)
        done = Tally(in_all, progress)
        others = faults_of_list(corpus.storage, corpus.content_sha256, corpus.lengths)
        others += faults_of_headers(corpus)
        faults = list[str]()
        with ThreadPoolExecutor(threads) as pool:
            for shard, scanned in enumerate(pool.map(lambda entry: scan(corpus.storage, entry, done.add), entries)):
                comparison.add(scanned)
                if not is_listed(scanned, entries[shard]):
                    faults += _faults_of_shard(corpus, shard, scanned)
        if foreign := comparison.foreign(corpus.storage):
            return [foreign, *others]
        strangers = _strangers(corpus.storage, corpus.manifest)
        faults = others + strangers + comparison.finish() + faults + closed
        with ThreadPoolExecutor(threads) as pool:
            for stored in entropies:
                for found in pool.map(partial(stored.faults_of, progress=done.add), range(len(entries))):
                    faults += found
        return faults


def faults_of_list(storage: Storage, content_sha256: str | None, lengths: NDArray[np.void] | None) -> list[str]:
    """Return a message if the list of withdrawn documents is faulty. Arguments are those of `read_withdrawn`."""
    try:
        read_withdrawn(storage, content_sha256, lengths)
    except CorpusError as error:
        return [str(error)]
    return []


def _faults_without_index(
    location: str | Path, threads: int, progress: Progress, remote: RemoteConfig | None
) -> list[str]:
    """Return the faults of a corpus whose manifest or index is damaged, so that no block can be found."""
    faults, arrays = list[str](), dict[str, NDArray[np.void]]()
    with closing(open_storage(location, remote or RemoteConfig())) as storage:
        try:
            manifest = read_manifest(storage)
        except CorpusError as error:
            return [str(error), *faults_of_list(storage, None, None)]
        for name in INDEX_FILES:
            try:
                arrays[name] = open_index_file(storage, manifest, name)
            except CorpusError as error:
                faults.append(str(error))
        others = faults_of_list(storage, manifest["content_sha256"], arrays.get("lengths"))
        comparison = Comparison(storage.location, manifest, arrays)
        done = Tally(sum(shard["bytes"] for shard in manifest["shards"]), progress)
        of_shards = list[str]()
        with ThreadPoolExecutor(threads) as pool:
            scans = pool.map(lambda entry: scan(storage, entry, done.add), manifest["shards"])
            for entry, scanned in zip(manifest["shards"], scans, strict=True):
                comparison.add(scanned)
                if not is_listed(scanned, entry):
                    of_shards.append(_as_a_whole(storage, entry, scanned))
        if foreign := comparison.foreign(storage):
            return [foreign, *others]
        return faults + others + _strangers(storage, manifest) + comparison.finish() + of_shards


class Comparison:
    """Comparison of the manifest and the index of a corpus with its shards, given one by one.

    Args:
        location: folder or URL of the corpus.
        manifest: the manifest.
        arrays: those of the index files that could be opened, by name.
    """

    def __init__(self, location: str, manifest: dict[str, Any], arrays: dict[str, NDArray[np.void]]) -> None:
        self._location, self._manifest, self._arrays = location, manifest, arrays
        self._faults = _faults_of_order(location, [entry["name"] for entry in manifest["shards"]])
        self._entries = list[dict[str, Any]]()  # as the shards show them, or as listed where they are damaged
        self._content: Any = hashlib.sha256()
        self._blocks = 0  # listed so far
        self._is_known = True  # whether the content of every shard so far is
        self._is_ours = False  # whether a shard holds what manifest and index say

    def add(self, scanned: ShardIndex | CorpusError) -> None:
        """Compare the next shard of the manifest. A shard that is not the listed one says nothing about the rest."""
        listed = self._manifest["shards"][len(self._entries)]
        own = slice(self._blocks, self._blocks + listed["blocks"])
        faults = [] if isinstance(scanned, CorpusError) else self._faults_of_shard(scanned, listed, own)
        if isinstance(scanned, ShardIndex) and is_listed(scanned, listed):
            self._is_ours = True
            self._faults += faults
            self._entries.append(scanned.entry)
            self._content.update(scanned.blocks["content_sha256"].tobytes())
        else:
            self._is_ours |= isinstance(scanned, ShardIndex) and not faults
            self._entries.append(listed)
            self._is_known &= "index" in self._arrays
            self._content.update(self._arrays["index"][own]["content_sha256"].tobytes() if self._is_known else b"")
        self._blocks = own.stop

    def _faults_of_shard(self, scanned: ShardIndex, listed: dict[str, Any], own: slice) -> list[str]:
        faults = [
            f"{self._location}/manifest.json says that {listed['name']} has {name} {listed.get(name)!r}, "
            f"and the shard has {scanned.entry.get(name)!r}"
            for name in (*SHARD_FIELDS, *(listed.keys() - SHARD_FIELDS.keys()))
            if name not in IDENTITY and listed.get(name) != scanned.entry.get(name)
        ]
        blocks = scanned.blocks.copy()
        blocks["shard"] = len(self._entries)
        for name, found in (("lengths", scanned.lengths), ("index", blocks)):
            if name in self._arrays and (fault := _first_difference(self._arrays[name][own], found)):
                faults.append(f"{self._location}/{name}.npy: {listed['name']}, {fault}")
        return faults

    def foreign(self, storage: Storage) -> str | None:
        """Return a message if the manifest is of another corpus: it lists no shard that is here, and others are whole.

        A manifest in a folder without shards is one, too. Nothing is known about a corpus at a URL.
        """
        folder = storage.local_folder
        if self._is_ours or folder is None or not _has_only_others(folder):
            return None
        has_shards = any(folder.glob("shard-*.tar"))
        kind = "is of another corpus" if has_shards else "is alone"
        shards = count(len(self._entries), "shard")
        text = f"{folder}/manifest.json {kind}: none of the {shards} that it lists is here"
        if parts := sorted(path.parent for path in folder.glob("*/manifest.json")):
            return f"{text}; remove it. The corpora here are {', '.join(map(str, parts))}"
        if not has_shards:
            return f"{text}; remove it, or restore the shards from a copy"
        return (
            f"{text}. If the shards here are whole, restore manifest.json, lengths.npy and index.npy from a copy, or "
            "move them away and write them again from the shards with byteloom verify --repair"
        )

    def finish(self) -> list[str]:
        """Return the faults, when every shard of the manifest was added."""
        digest = self._content.hexdigest() if self._is_known else self._manifest["content_sha256"]
        found = fields_of_shards(self._entries, digest)
        for name in (*found.keys() - {"format", "shards"}, *(self._manifest.keys() - FIELDS.keys() - {CARD_FIELD})):
            if self._manifest[name] != found.get(name):
                self._faults.append(
                    f"{self._location}/manifest.json says that {name} is {self._manifest[name]!r}, "
                    f"and the shards have {found.get(name)!r}"
                )
        for name, records in self._arrays.items():
            if len(records) != self._blocks:
                self._faults.append(
                    f"{self._location}/{name}.npy lists {count(len(records), 'block')}, "
                    f"and the shards of manifest.json have {self._blocks:,}"
                )
        if self._faults:
            self._faults.append("byteloom verify --repair writes manifest and index again from intact shards")
        return self._faults


def _faults_of_order(location: str, names: list[str]) -> list[str]:
    """Return a message if shards are not listed once each, in the order of their numbers."""
    for before, after in pairwise(names):
        if number_of_shard(before) >= number_of_shard(after):
            return [f"{location}/manifest.json lists {before} before {after}, out of order"]
    odd = [name for name in names if name != shard_name(number_of_shard(name))]
    return [f"{location}/manifest.json lists {odd[0]}, which is not the name of a shard"] if odd else []


def _first_difference(records: NDArray[np.void], found: NDArray[np.void]) -> str | None:
    """Return where the records of a shard's blocks differ from those that were found; None if they do not."""
    if len(records) != len(found):
        return f"it has records of {count(len(records), 'block')}, and the shard has {len(found):,}"
    for name in found.dtype.names or ():
        differ = np.asarray(records[name] != found[name]).reshape(len(found), -1).any(1)
        if differ.any():
            block = int(differ.argmax())
            listed, own = (_shown(rows[block][name]) for rows in (records, found))
            return f"block {block}: its {name} is {listed}, and in the shard {own}"
    return None


def _shown(value: Any) -> str:
    return value.tobytes().hex() if isinstance(value, np.ndarray) else str(value)


def faults_of_headers(corpus: Corpus) -> list[str]:
    """Return a message for each index file that has other bytes than a header and its records."""
    faults = []
    for name, records in (("lengths", corpus.lengths), ("index", corpus.index)):
        header = index_header(name, len(records))
        digest = blake3.blake3(header).update(records.view(np.uint8).data).hexdigest()
        listed = corpus.manifest[f"{name}_bytes"], corpus.manifest[f"{name}_blake3"]
        if listed != (len(header) + records.nbytes, digest):
            faults.append(
                f"{corpus.location}/{name}.npy, or its size in manifest.json, is not what its records need; "
                "byteloom verify --repair writes it again from intact shards"
            )
    return faults


def _strangers(storage: Storage, manifest: dict[str, Any]) -> list[str]:
    """Return a message for each shard file in the folder that the manifest does not list, whole or half-written."""
    known = {entry["name"] for entry in manifest["shards"]}
    paths = [path for path in storage.shard_files() if path.name not in known]
    return [f"{path} is not in manifest.json; remove that file" for path in paths]


def _has_only_others(folder: Path) -> bool:
    """Return whether a folder, in which no listed shard was found, has a whole shard or none at all."""
    paths = sorted(folder.glob("shard-*.tar"))
    for path in paths:
        try:
            scan_shard(path, _silent)
        except CorpusError:
            continue
        return True
    return not paths


def scan(storage: Storage, entry: dict[str, Any], progress: Callable[[int], None]) -> ShardIndex | CorpusError:
    """Return the index of a shard, made from its tar, or the reason why it cannot be made.

    Args:
        storage: files of the corpus.
        entry: the shard's entry in the manifest.
        progress: called with the number of bytes of each read.
    """
    fault, attempts = None, min(storage.rereads, 2)  # bytes may be damaged on the way
    for attempt in range(attempts):
        try:
            storage.check_size(entry["name"], entry["bytes"])
            stored = io.BufferedReader(_StoredFile(storage, entry["name"], entry["bytes"]), PIECE_BYTES)
            with stored:
                found = scan_tar(f"{storage.location}/{entry['name']}", stored, _silent if attempt else progress)
        except CorpusError as error:
            fault = error
        else:
            if is_listed(found, entry) or attempt + 1 == attempts:
                return found
    assert fault is not None, "the last attempt returns an index or has a fault"
    return fault


def _silent(size: int) -> None:
    """Report nothing: the bytes were reported when they were read first."""


def is_listed(scanned: ShardIndex | CorpusError, entry: dict[str, Any]) -> bool:
    """Return whether a shard is, to the byte, the one of an entry of the manifest."""
    return isinstance(scanned, ShardIndex) and all(scanned.entry[name] == entry[name] for name in IDENTITY)


IDENTITY = ("name", "sha256")
"""Fields of a manifest's entry that identify a shard."""


class _StoredFile(io.RawIOBase):
    """A file of a corpus, read from its start."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage, self._name, self._size = storage, name, size
        self._place = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        end = min(self._place + len(buffer), self._size)
        size = end - self._place
        if size:
            buffer[:size] = self._storage.read(self._name, self._place, end)
            self._place = end
        return size


def _faults_of_shard(corpus: Corpus, shard: int, scanned: ShardIndex | CorpusError) -> list[str]:
    """Return the damaged blocks of a shard that is not as it was written, or what else is wrong with it."""
    blocks = corpus.blocks_of(shard)
    if blocks.stop > len(corpus):
        return [_as_a_whole(corpus.storage, corpus.manifest["shards"][shard], scanned)]
    faults = []
    for block in blocks:
        try:
            corpus.read(block)
        except CorpusError as error:
            if isinstance(error, CorruptBlockError) and not isinstance(error, ShardEndsError):
                faults.append(str(error))
                continue
            # The tar is missing or ends here: the later blocks cannot be read either.
            return [*faults, f"{error}: {blocks[-1] - block + 1} of {count(len(blocks), 'block')} lost"]
    if faults:
        return faults
    fault = _as_a_whole(corpus.storage, corpus.manifest["shards"][shard], scanned)
    return [f"{fault}; the damage is between its blocks, and all documents can be read"]


def _as_a_whole(storage: Storage, entry: dict[str, Any], scanned: ShardIndex | CorpusError) -> str:
    """Return what is wrong with the tar of a shard that is not as it was written."""
    if isinstance(scanned, CorpusError):
        return str(scanned)
    return f"{storage.location}/{entry['name']} is damaged: its digest is not the one in manifest.json"
