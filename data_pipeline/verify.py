"""Is a corpus, to the last byte, what was written?

The manifest has a digest of itself, of the index and of every shard, so any changed, missing or added byte is found;
the blocks of a damaged shard are then read one by one to say which of them are lost.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.errors import CorpusError
from data_pipeline.shards import Corpus, sha256_of


def verify(folder: Path, threads: int, progress: Callable[[int], None]) -> list[str]:
    """Every fault of a corpus, in words; none when it is whole.

    Args:
        threads: shards that are read at once.
        progress: called with the number of bytes of a shard that has been read.
    """
    try:
        corpus = Corpus(folder, check_shards=False)
    except CorpusError as error:
        return [str(error)]
    shards = range(len(corpus.manifest["shards"]))
    with corpus, ThreadPoolExecutor(threads) as pool:

        def faults_of(shard: int) -> list[str]:
            faults = _faults_of_shard(corpus, shard)
            progress(int(corpus.manifest["shards"][shard]["bytes"]))
            return faults

        return [fault for faults in pool.map(faults_of, shards) for fault in faults]


def _faults_of_shard(corpus: Corpus, shard: int) -> list[str]:
    entry = corpus.manifest["shards"][shard]
    path = corpus.folder / entry["name"]
    try:
        if path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]:
            return []
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    lost = []
    for block in (corpus.index["shard"] == shard).nonzero()[0]:
        try:
            corpus.read(int(block))
        except CorpusError as error:
            lost.append(str(error))
    return lost or [f"{path} is damaged between its blocks: every document can be read"]
