"""Small corpora for tests, written without `prepare`."""

import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.corpus.blocks import pack_documents
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.index import ShardIndex, write_shard
from data_pipeline.corpus.manifest import write_index
from data_pipeline.corpus.repair import repair
from data_pipeline.corpus.verify import verify
from data_pipeline.documents import Document


def documents() -> Iterator[Document]:
    """Yield some thirty files of Python's library, and one document that runs through several blocks and two shards."""
    files = sorted(Path(sysconfig.get_path("stdlib"), "email").glob("*.py"))
    for path in files[:20]:
        yield Document(f"email/{path.name}", "code", lambda path=path: iter([path.read_bytes()]))
    yield Document("long", "binary", lambda: iter([bytes(range(256)) * 100] * 4))
    for path in files[20:]:
        yield Document(f"email/{path.name}", "code", lambda path=path: iter([path.read_bytes()]))


def write_shards(folder: Path, block_bytes: int = 6_000, blocks_per_shard: int = 11) -> list[ShardIndex]:
    """Write the shards of a corpus without an index."""
    folder.mkdir(parents=True)
    blocks = pack_documents(documents(), block_bytes, lambda document, error: None)
    shards = []
    for number in itertools.count():
        shard = write_shard(folder, number, itertools.islice(blocks, blocks_per_shard), level=3)
        if shard is None:
            return shards
        shards.append(shard)
    raise AssertionError("endless")


def write_corpus(folder: Path, block_bytes: int = 6_000, blocks_per_shard: int = 11) -> Corpus:
    write_index(folder, write_shards(folder, block_bytes, blocks_per_shard))
    return Corpus(folder)


def flip(path: Path, place: int, bit: int = 4) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def damage_block(folder: Path, block: int) -> None:
    """Flip a bit in the middle of a block's frame."""
    with Corpus(folder, check_shards=False) as corpus:
        record = corpus.index[block]
        name = corpus.manifest["shards"][int(record["shard"])]["name"]
        flip(folder / name, int(record["frame_offset"] + record["frame_bytes"] // 2))


def faults(folder: Path) -> list[str]:
    """Return the faults that `verify` finds in a corpus."""
    return verify(folder, threads=2, progress=lambda done, total: None)


def mend(folder: Path, mirror: Corpus | None = None) -> list[str]:
    """Repair a corpus; return what was done."""
    return repair(folder, mirror.location if mirror else None, threads=2, progress=lambda done, total: None)


def contents(folder: str | Path) -> dict[str, bytes]:
    """Return the files of a folder by name."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
