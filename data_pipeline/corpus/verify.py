"""Verify that every byte of a corpus is what was written.

The manifest has a digest of itself, of the index files and of every shard. The list of withdrawn documents has its own.
Every changed, missing or added byte is found, with one exception: a deleted list of withdrawn documents. The blocks of
a damaged shard are read one by one to name the damaged ones.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from byteloom.core.progress import Progress, Tally
from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.index import INDEX_FILES, open_index_file
from data_pipeline.corpus.manifest import read_manifest
from data_pipeline.corpus.remote import PIECE_BYTES, RemoteConfig
from data_pipeline.corpus.storage import Storage, open_storage
from data_pipeline.corpus.withdrawn import read_withdrawn
from data_pipeline.errors import CorpusError, CorruptBlockError, ShardEndsError


def verify(location: str | Path, threads: int, progress: Progress, remote: RemoteConfig | None = None) -> list[str]:
    """Return a message for every fault of a corpus; none if it is intact.

    Each thread holds a piece of 8 MiB and a block in memory.

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
        shards = range(len(corpus.manifest["shards"]))
        done = Tally(sum(shard["bytes"] for shard in corpus.manifest["shards"]), progress)
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda shard: _faults_of_shard(corpus, shard, done.add), shards))
        faults = [fault for faults in found for fault in faults]
        others = faults_of_list(corpus.storage, corpus.content_sha256, corpus.lengths)
        return others + _strangers(corpus.storage, corpus.manifest) + faults


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
        faults += faults_of_list(storage, manifest["content_sha256"], arrays.get("lengths"))
        faults += _strangers(storage, manifest)
        done = Tally(sum(shard["bytes"] for shard in manifest["shards"]), progress)
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda entry: fault_of_tar(storage, entry, done.add), manifest["shards"])
            return faults + [fault for fault in found if fault is not None]


def _strangers(storage: Storage, manifest: dict[str, Any]) -> list[str]:
    """Return a message for each shard file in the folder that the manifest does not list, whole or half-written."""
    known = {entry["name"] for entry in manifest["shards"]}
    paths = [path for path in storage.shard_files() if path.name not in known]
    return [f"{path} is not in manifest.json; remove that file" for path in paths]


def _faults_of_shard(corpus: Corpus, shard: int, progress: Callable[[int], None]) -> list[str]:
    entry = corpus.manifest["shards"][shard]
    fault = fault_of_tar(corpus.storage, entry, progress)
    if fault is None:
        return []
    faults = []
    blocks = corpus.blocks_of(shard)
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
    if corpus.storage.rereads > 1 and fault_of_tar(corpus.storage, entry, lambda size: None) is None:
        return []  # the bytes were damaged on the way
    return [f"{fault}; the damage is between its blocks, and all documents can be read"]


def fault_of_tar(storage: Storage, entry: dict[str, Any], progress: Callable[[int], None]) -> str | None:
    """Return what is wrong with a shard's tar as a whole; None if it has the digest in the manifest.

    Args:
        storage: files of the corpus.
        entry: the shard's entry in the manifest.
        progress: called with the number of bytes of each read.
    """
    path = f"{storage.location}/{entry['name']}"
    sha = hashlib.sha256()
    try:
        storage.check_size(entry["name"], entry["bytes"])
        for begin in range(0, entry["bytes"], PIECE_BYTES):
            piece = storage.read(entry["name"], begin, min(begin + PIECE_BYTES, entry["bytes"]))
            sha.update(piece)
            progress(len(piece))
    except CorpusError as error:
        return str(error)
    return (
        None if sha.hexdigest() == entry["sha256"] else f"{path} is damaged: its digest is not the one in manifest.json"
    )
