"""Four ranks read a thousand batches over servers that fail at random. Every byte is that of a local read."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.storage.remote import RemoteConfig
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.stream.loader import Loader, LoaderConfig
from tests.data_pipeline.corpora import write_corpus
from tests.data_pipeline.corpus.faulty_server import FaultyServer
from tests.s3 import faulty_proxy, s3_client, s3_server

BATCHES = 1000
RANKS = 4
GLOBAL_BATCH = 16
# Little memory, so that servers get many requests. Attempts and deadline are large enough for random faults.
REMOTE = RemoteConfig(
    attempts=200, backoff_seconds=0.001, timeout_seconds=0.5, deadline_seconds=3600, memory_bytes=50_000
)
WEB_FAULTS = ("drop", "drip", "missing", "denied", "busy", "broken", "short", "flip", "elsewhere")
S3_FAULTS = ("cut", "missing", "denied", "expired", "busy", "broken")


def rows_of_rank(location: str, rank: int) -> list[bytes]:
    """Return the bytes of a rank's micro-batches, batch by batch."""
    with Corpus(location, remote=REMOTE) as corpus:
        stream = ByteStream(corpus, PackingConfig(), 400, lanes=GLOBAL_BATCH, seed=0, bad_blocks=0)
        loader = Loader(stream, LoaderConfig(), global_batch=GLOBAL_BATCH, micro_batch=2, rank=rank, world_size=RANKS)
        with loader:
            batches: Iterator = iter(loader)
            found = [next(batches).micro_batches for _ in range(BATCHES)]
    return [np.concatenate([micro.ids for micro in batch]).tobytes() for batch in found]


def rows(location: str) -> list[list[bytes]]:
    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(lambda rank: rows_of_rank(location, rank), range(RANKS)))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = write_corpus(tmp_path_factory.mktemp("soak") / "corpus", blocks_per_shard=4)
    corpus.close()
    return Path(corpus.location)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_batches_from_a_faulty_web_server_equal_those_of_a_folder(local: Path):
    draw = random.Random(0)

    def fault_of(name: str) -> str | None:
        return draw.choice(WEB_FAULTS) if name.startswith("shard-") and draw.random() < 0.1 else None

    with FaultyServer(local, fault_of) as server:
        assert rows(server.url) == rows(str(local))
    assert set(server.injected) == set(WEB_FAULTS)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_batches_from_a_faulty_object_store_equal_those_of_a_folder(local: Path):
    draw = random.Random(0)

    def fault_of(path: str, credentials: str) -> str | None:
        return draw.choice(S3_FAULTS) if "shard-" in path and draw.random() < 0.1 else None

    with s3_server("soak"):
        for path in local.iterdir():
            s3_client().upload_file(str(path), "soak", f"corpus/{path.name}")
        with faulty_proxy(fault_of) as proxy:
            assert rows("s3://soak/corpus") == rows(str(local))
    assert set(proxy.injected) == set(S3_FAULTS)
