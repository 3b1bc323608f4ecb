"""A corpus at a URL: good and faulty real servers never return a wrong byte."""

import contextlib
import itertools
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.repair import repair
from data_pipeline.corpus.storage.remote import RemoteConfig
from data_pipeline.corpus.tar import shard_name
from data_pipeline.corpus.verify import verify
from data_pipeline.errors import CorpusError, CorruptBlockError
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.stream.order import MOST_SLICES, SLICE_BYTES
from tests.data_pipeline.corpora import damage_block, flip
from tests.data_pipeline.corpus.faulty_server import FAULTS, FaultyServer
from tests.s3 import s3_client, s3_server

FAST = RemoteConfig(attempts=4, backoff_seconds=0.001, timeout_seconds=20)
IMPATIENT = FAST.model_copy(update={"timeout_seconds": 0.2})
"""For servers that do not answer. On a busy machine, this abandons good answers too."""
PATIENT = FAST.model_copy(update={"attempts": 30, "deadline_seconds": 1.0})


def only_shards(fault: str):
    return lambda name: fault if name.endswith(".tar") else None


def cached(folder: Path, size: int = 1 << 30) -> RemoteConfig:
    return FAST.model_copy(update={"cache": str(folder), "cache_bytes": size})


def held_bytes(cache: Path) -> int:
    """Return the size of the files in a cache. Files that come or go meanwhile do not count."""
    first, second = held_files(cache), held_files(cache)
    return sum(size for (_, size) in first & second)


def held_files(cache: Path) -> set[tuple[int, int]]:
    """Return inode and size of the files in a cache."""
    held = set()
    for path in cache.glob("spans/*/*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            held.add((status.st_ino, status.st_size))
    return held


def shard_requests(server: FaultyServer) -> int:
    return sum(count for name, count in server.requests.items() if name.endswith(".tar"))


def test_corpus_at_a_url_equals_the_local_corpus(server: FaultyServer, local: Corpus, expected: list[bytes]):
    with Corpus(server.url, remote=FAST) as corpus:
        assert corpus.content_sha256 == local.content_sha256
        assert corpus.location == server.url
        for block, raw in enumerate(expected):
            assert corpus.read_content(block, through=block + 5)[0] == raw
            assert corpus.read(block) == local.read(block)


def test_adjacent_blocks_come_in_one_request(server: FaultyServer, expected: list[bytes]):
    with Corpus(server.url, remote=FAST) as corpus:
        shard = corpus.blocks_of(1)
        for block in shard:
            assert corpus.read_content(block, through=len(corpus) - 1)[0] == expected[block]
        assert server.requests[shard_name(1)] == 1
        assert shard_requests(server) == 1  # a span ends with its shard


def test_threads_that_read_one_span_share_one_request(server: FaultyServer, expected: list[bytes]):
    barrier = threading.Barrier(8)

    def read(block: int) -> bytes:
        barrier.wait()
        return corpus.read_content(0 if block % 2 else block, through=8)[0]

    with Corpus(server.url, remote=FAST) as corpus, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, [0, 1] * 4)) == [expected[0]] * 8
        assert server.requests[shard_name(0)] == 1


def test_memory_stays_within_its_limit(server: FaultyServer, local: Corpus, expected: list[bytes]):
    """Memory has room for one span. Reading an earlier block again costs one request and returns the same bytes."""
    remote = FAST.model_copy(update={"memory_bytes": 1})
    with Corpus(server.url, remote=remote) as corpus:
        for block in (0, 11, 1, 12, 2):
            assert corpus.read_content(block, through=block + 5)[0] == expected[block]
        assert shard_requests(server) == 5


@pytest.mark.slow
def test_stream_sends_one_request_for_a_slice_of_an_extent(server: FaultyServer, local: Corpus):
    """This corpus is one extent. The borders of its shards and of the slices of the order cut it."""
    with Corpus(server.url, remote=FAST) as corpus:
        here, there = (ByteStream(c, PackingConfig(), 500, lanes=1, seed=0, bad_blocks=0) for c in (local, corpus))
        assert here.fingerprint == there.fingerprint
        for g in range(here.sequences_per_epoch):
            np.testing.assert_array_equal(here[g], there[g])
    slices = min(MOST_SLICES, local.raw_bytes // SLICE_BYTES)
    assert shard_requests(server) <= len(local.manifest["shards"]) + slices


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["drop", "short", "stall", "busy", "broken"])
def test_a_passing_fault_is_retried_and_a_lasting_one_is_named(server: FaultyServer, expected: list[bytes], fault: str):
    answers = iter([fault, fault])
    with Corpus(server.url, remote=IMPATIENT if fault == "stall" else FAST) as corpus:
        server.fault_of = lambda name: next(answers, None)
        assert corpus.read_content(3, through=9)[0] == expected[3]
        server.fault_of = only_shards(fault)
        with pytest.raises(CorpusError, match=rf"{shard_name(1)} cannot be read.*attempt 4 of 4"):
            corpus.read_content(14)


@pytest.mark.slow
def test_retry_waits_as_long_as_the_server_asks(server: FaultyServer, expected: list[bytes]):
    answers = iter(["busy"])
    server.retry_after = 0.5
    with Corpus(server.url, remote=FAST) as corpus:
        server.fault_of = lambda name: next(answers, None)
        start = time.perf_counter()
        assert corpus.read_content(3)[0] == expected[3]
        assert time.perf_counter() - start >= 0.5


@pytest.mark.parametrize("fault", ["elsewhere", "flip"])
def test_wrong_bytes_are_fetched_again_and_then_refused(server: FaultyServer, expected: list[bytes], fault: str):
    answers = iter([fault, None])
    with Corpus(server.url, remote=FAST) as corpus:
        server.fault_of = lambda name: next(answers, None)
        for block in range(8):
            assert corpus.read_content(block, through=9)[0] == expected[block]
        server.fault_of = only_shards(fault)
        with pytest.raises(CorruptBlockError, match=r"block 000001-000003 of .* is damaged"):
            corpus.read_content(14)


def test_server_that_ignores_ranges_is_read(
    server: FaultyServer, expected: list[bytes], caplog: pytest.LogCaptureFixture
):
    server.fault_of = lambda name: "whole"
    with Corpus(server.url, remote=FAST) as corpus:
        assert [corpus.read_content(block)[0] for block in range(len(corpus))] == expected
    assert [record.message.partition(" sends whole files")[1:] for record in caplog.records] == [
        (" sends whole files", " instead of parts of them, so reading is slow")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_cache", [False, True])
def test_no_fault_of_a_server_returns_a_wrong_byte(
    server: FaultyServer, expected: list[bytes], tmp_path: Path, seed: int, with_cache: bool
):
    """Every answer fails with probability 0.5, also those for the manifest and the index files. Faults vary."""
    draw = random.Random(seed)
    server.fault_of = lambda name: draw.choice(FAULTS) if draw.random() < 0.5 else None
    hardly_any = {"memory_bytes": 0, "cache": str(tmp_path) if with_cache else None, "cache_bytes": 20_000}
    remote = PATIENT.model_copy(update=hardly_any | {"timeout_seconds": 0.2, "deadline_seconds": 60.0})
    outcomes = {"right": 0, "refused": 0}

    def read(block: int) -> None:
        try:
            raw = corpus.read_content(block, through=block + draw.randrange(6))[0]
        except CorruptBlockError:  # all of its answers were wrong
            outcomes["refused"] += 1
        else:
            assert raw == expected[block]
            outcomes["right"] += 1

    while True:
        try:
            corpus = Corpus(server.url, remote=remote)
        except CorpusError as error:
            assert "is damaged" in str(error)
        else:
            break
    with corpus, ThreadPoolExecutor(4) as pool:
        list(pool.map(read, draw.sample(range(len(corpus)), 40)))
    assert outcomes["right"] >= 30
    assert server.injected.total() >= 10


def test_a_missing_corpus_is_named_at_once(server: FaultyServer, tmp_path: Path):
    server.folder = tmp_path
    with pytest.raises(CorpusError, match=r"manifest.json cannot be read: there is no such file"):
        Corpus(server.url)
    assert server.requests["manifest.json"] == 1
    with pytest.raises(CorpusError, match="nonsense://host/corpus cannot be opened"):
        Corpus("nonsense://host/corpus")


def test_a_server_that_does_not_answer_is_named(local: Corpus):
    with FaultyServer(Path(local.location)) as server:
        url = server.url
        corpus = Corpus(url, remote=FAST)
    with pytest.raises(CorpusError, match=r"cannot be read: .*attempt 4 of 4"):
        corpus.read_content(0)
    corpus.close()


@pytest.mark.slow
def test_the_cache_serves_the_next_run(server: FaultyServer, expected: list[bytes], tmp_path: Path):
    for run in range(2):
        with Corpus(server.url, remote=cached(tmp_path)) as corpus:
            for block in range(len(corpus)):
                assert corpus.read_content(block, through=block // 4 * 4 + 3)[0] == expected[block]
        if run == 0:
            before = shard_requests(server)
    assert shard_requests(server) == before > 0
    assert server.requests["index.npy"] == server.requests["lengths.npy"] == 1
    assert server.requests["manifest.json"] == 2


@pytest.mark.slow
def test_a_damaged_cache_is_mended(server: FaultyServer, expected: list[bytes], tmp_path: Path):
    def read_all() -> None:
        with Corpus(server.url, remote=cached(tmp_path)) as corpus:
            assert [corpus.read_content(block)[0] for block in range(len(corpus))] == expected

    read_all()
    spans = sorted(tmp_path.glob("spans/*/*"))
    assert len(spans) == len(expected)
    before = shard_requests(server)
    for number, path in enumerate(spans[::3]):
        if number % 3 == 0:
            flip(path, 10)
        else:
            path.write_bytes(path.read_bytes()[:-1] if number % 3 == 1 else b"")
    for path in tmp_path.glob("indexes/*.npy"):
        flip(path, path.stat().st_size // 2)
    read_all()
    assert shard_requests(server) == before + len(spans[::3])
    assert server.requests["index.npy"] == 2
    read_all()


@pytest.mark.slow
def test_the_cache_stays_within_its_limit_and_drops_the_least_recently_used_blocks(
    server: FaultyServer, expected: list[bytes], tmp_path: Path
):
    limit = 40_000
    with Corpus(server.url, remote=cached(tmp_path, limit).model_copy(update={"memory_bytes": 0})) as corpus:
        for block in range(len(corpus)):
            assert corpus.read_content(block)[0] == expected[block]
            assert corpus.read_content(0)[0] == expected[0]  # used again and again, so never dropped
            assert held_bytes(tmp_path) <= limit
    assert shard_requests(server) == len(expected)


READ_ALL = """
import random, sys
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.storage.remote import RemoteConfig
url, cache, limit, seed = sys.argv[1:]
with Corpus(url, remote=RemoteConfig(cache=cache, cache_bytes=int(limit), memory_bytes=0)) as corpus:
    order = [block for block in range(len(corpus)) for _ in range(2)]
    random.Random(int(seed)).shuffle(order)
    for block in order:
        assert corpus.read_content(block)[0] == corpus.read(block).content
"""


@pytest.mark.slow
def test_processes_share_a_cache(server: FaultyServer, tmp_path: Path):
    limit = 60_000
    arguments = [sys.executable, "-c", READ_ALL, server.url, str(tmp_path), str(limit)]
    readers = [subprocess.Popen([*arguments, str(seed)]) for seed in range(3)]
    while any(reader.poll() is None for reader in readers):
        assert held_bytes(tmp_path) <= 1.2 * limit  # each of two others may be writing a span
        time.sleep(0.02)
    assert [reader.returncode for reader in readers] == [0, 0, 0]
    assert server.requests["index.npy"] == 1


@pytest.mark.slow
def test_cache_that_cannot_be_written_costs_only_speed(
    server: FaultyServer, expected: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    answers = iter(["flip"])
    with Corpus(server.url, remote=cached(tmp_path)) as corpus:
        shutil.rmtree(tmp_path / "spans")
        (tmp_path / "spans").write_text("in the way")
        server.fault_of = lambda name: next(answers, None)  # wrong blocks are also removed from the cache
        assert [corpus.read_content(block)[0] for block in range(len(corpus))] == expected
    assert ["cannot be written" in record.message for record in caplog.records] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("in_the_way", [".", "spans", "indexes"])
def test_cache_that_cannot_be_created_costs_only_speed(
    server: FaultyServer, expected: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture, in_the_way: str
):
    cache = tmp_path / "cache"
    path = cache / in_the_way
    path.parent.mkdir(exist_ok=True)
    path.write_text("in the way")
    with Corpus(server.url, remote=cached(cache)) as corpus:
        assert [corpus.read_content(block)[0] for block in range(len(corpus))] == expected
    assert ["cannot use the cache" in record.message for record in caplog.records] == [True]


def test_closing_a_corpus_does_not_wait_for_a_server(server: FaultyServer):
    server.retry_after = 25.0
    asked = threading.Event()

    def busy(name: str) -> str:
        asked.set()
        return "busy"

    with ThreadPoolExecutor(1) as pool:
        with Corpus(server.url, remote=FAST) as corpus:
            server.fault_of = busy
            reading = pool.submit(corpus.read_content, 3)
            assert asked.wait(60)
        with pytest.raises(CorpusError, match="the corpus is closed"):
            reading.result(timeout=20)  # less than the wait that the server asks for
    before = shard_requests(server)
    with pytest.raises(CorpusError, match="the corpus is closed"):
        corpus.read_content(20)
    assert shard_requests(server) == before


def test_refused_corpus_leaves_no_temporary_files(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server.fault_of = lambda name: "flip" if name == "index.npy" else None
    with pytest.raises(CorpusError, match=r"index.npy is damaged") as refusal:
        Corpus(server.url, remote=FAST)
    assert refusal.tb is not None  # keeps references to every object of the failed opening
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_verify_reads_a_corpus_at_a_url(server: FaultyServer, local: Corpus, tmp_path: Path):
    faults = itertools.cycle(["drop", None, None])
    server.fault_of = lambda name: next(faults)
    calls = list[tuple[int, int]]()
    assert verify(server.url, 2, lambda *call: calls.append(call), PATIENT) == []
    total = sum(entry["bytes"] for entry in local.manifest["shards"])
    assert calls[-1] == (total, total)
    copy = shutil.copytree(local.location, tmp_path / "copy")
    damage_block(copy, 13)
    (copy / shard_name(2)).unlink()
    server.folder = copy
    first, second = verify(server.url, 2, lambda *call: None, PATIENT)
    assert first.startswith("block 000001-000002 of http://")
    assert second.endswith(": 11 of 11 blocks lost")
    assert "shard-000002.tar cannot be read: there is no such file, though manifest.json names it; check" in second


def test_verify_ignores_damage_of_the_network(server: FaultyServer):
    answers = iter(["flip"])
    server.fault_of = lambda name: next(answers, None) if name == shard_name(1) else None
    assert verify(server.url, 1, lambda *call: None, FAST) == []


def test_repair_from_a_bad_mirror(server: FaultyServer, local: Corpus, tmp_path: Path):
    copy = shutil.copytree(local.location, tmp_path / "copy")
    damage_block(copy, 13)
    (copy / shard_name(2)).unlink()
    (copy / "index.npy").unlink()
    draw = random.Random(0)
    server.fault_of = lambda name: draw.choice(FAULTS) if draw.random() < 0.2 else None
    repair(copy, server.url, 2, lambda *call: None, PATIENT.model_copy(update={"deadline_seconds": 60.0}))
    assert verify(copy, 2, lambda *call: None) == []
    for path in Path(local.location).iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()


@pytest.fixture
def bucket() -> Iterator[str]:
    """Yield the URL of an empty bucket on a local S3 server."""
    with s3_server("corpora"):
        yield "s3://corpora/mail"


def upload(folder: Path) -> None:
    client = s3_client()
    for path in folder.iterdir():
        client.upload_file(str(path), "corpora", f"mail/{path.name}")


@pytest.mark.slow
def test_a_corpus_in_s3(bucket: str, local: Corpus, expected: list[bytes], tmp_path: Path):
    upload(Path(local.location))
    for _ in range(2):
        with Corpus(bucket, remote=cached(tmp_path / "cache").model_copy(update={"timeout_seconds": 10})) as corpus:
            assert [corpus.read_content(block, through=block + 4)[0] for block in range(len(corpus))] == expected
    assert verify(bucket, 2, lambda *call: None) == []


@pytest.mark.slow
def test_a_damaged_corpus_in_s3(bucket: str, local: Corpus, tmp_path: Path):
    copy = shutil.copytree(local.location, tmp_path / "copy")
    damage_block(copy, 13)
    (copy / shard_name(2)).write_bytes((copy / shard_name(2)).read_bytes()[:20_000])
    upload(copy)
    remote = FAST.model_copy(update={"timeout_seconds": 10})
    with Corpus(bucket, remote=remote) as corpus:
        with pytest.raises(CorruptBlockError, match=r"block 000001-000002 of s3://corpora/mail/shard-000001.tar"):
            corpus.read_content(13)
        with pytest.raises(CorpusError, match=rf"{shard_name(2)} cannot be read"):
            corpus.read_content(32)
    s3_client().delete_object(Bucket="corpora", Key="mail/index.npy")
    with pytest.raises(CorpusError, match=r"index.npy cannot be read: there is no such file"):
        Corpus(bucket, remote=remote)


@pytest.mark.slow
def test_repair_from_s3(bucket: str, local: Corpus, tmp_path: Path):
    upload(Path(local.location))
    copy = shutil.copytree(local.location, tmp_path / "copy")
    damage_block(copy, 13)
    repair(copy, bucket, 2, lambda *call: None)
    assert verify(copy, 2, lambda *call: None) == []
