"""A run reads the right bytes while servers, credentials, disks and caches fail."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.storage import cache as cache_module
from data_pipeline.corpus.storage.remote import RemoteConfig
from data_pipeline.corpus.tar import shard_name
from data_pipeline.errors import CorpusError, ForbiddenError, MissingFileError
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.stream.loader import Loader, LoaderConfig
from tests.data_pipeline.corpus.faulty_server import FaultyServer
from tests.s3 import faulty_proxy, s3_client, s3_server

FAST = RemoteConfig(attempts=4, backoff_seconds=0.001, timeout_seconds=20)
IMPATIENT = FAST.model_copy(update={"timeout_seconds": 0.2})
"""For servers that answer slowly. On a busy machine, this abandons good answers too."""
S3 = FAST
PATIENT = RemoteConfig(attempts=100, backoff_seconds=1e6, timeout_seconds=60, deadline_seconds=1e6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("missing", MissingFileError, "there is no such file, though manifest.json names it; check"),
        ("denied", ForbiddenError, "403.*though manifest.json names it; check"),
        ("drip", CorpusError, r"not complete after 0\.\d+ s.*attempt 4 of 4"),
    ],
)
def test_file_of_the_manifest_is_requested_until_the_deadline(
    server: FaultyServer, expected: list[bytes], fault: str, kind: type[Exception], said: str
):
    answers = iter([fault, fault])
    with Corpus(server.url, remote=IMPATIENT if fault == "drip" else FAST) as corpus:
        server.fault_of = lambda name: next(answers, None)
        assert corpus.read_content(3, through=9)[0] == expected[3]
        server.fault_of = lambda name: fault
        with pytest.raises(kind, match=rf"{shard_name(1)} cannot be read: .*{said}"):
            corpus.read_content(14)


@pytest.mark.parametrize("fault", ["missing", "denied"])
def test_request_for_an_index_file_is_retried(server: FaultyServer, expected: list[bytes], fault: str):
    answers = iter([fault])
    server.fault_of = lambda name: next(answers, None) if name == "index.npy" else None
    with Corpus(server.url, remote=FAST) as corpus:
        assert corpus.read_content(0)[0] == expected[0]


def test_a_signature_in_the_url_stays_at_its_end_and_out_of_messages(server: FaultyServer, expected: list[bytes]):
    with Corpus(f"{server.url}/?sig=a%2Bb", remote=FAST) as corpus:
        assert corpus.read_content(0)[0] == expected[0]
        assert corpus.location == server.url
    assert set(server.paths) == {
        f"/corpus/{name}?sig=a%2Bb" for name in ("manifest.json", "index.npy", "lengths.npy", shard_name(0))
    }


def test_a_proxy_of_the_environment_is_used(
    server: FaultyServer, expected: list[bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/corpus"))
    monkeypatch.setenv("no_proxy", "")
    with Corpus("http://data.invalid/corpus", remote=FAST) as corpus:
        assert corpus.read_content(0)[0] == expected[0]
    assert server.paths[0] == "http://data.invalid/corpus/manifest.json"


@pytest.mark.parametrize("fault", ["drip", "stall", "busy"])
def test_a_loader_is_closed_at_once(server: FaultyServer, fault: str):
    """A reader that is not stopped would wait longer than the time limit of the test."""
    reading = threading.Event()
    server.retry_after = 1e6

    def faulty(name: str) -> str:
        reading.set()
        return fault

    with Corpus(server.url, remote=PATIENT) as corpus:
        stream = ByteStream(corpus, PackingConfig(), 500, lanes=2, seed=0, bad_blocks=0)
        server.fault_of = faulty
        with Loader(stream, LoaderConfig(threads=2), global_batch=2, micro_batch=2) as loader:
            batches = ThreadPoolExecutor(1).submit(next, iter(loader))
            assert reading.wait(60)
    with pytest.raises(CorpusError, match=r"the (corpus|loader) is closed"):
        batches.result(25)


@pytest.fixture
def bucket(local: Corpus) -> Iterator[str]:
    """Put the corpus into a bucket of a local S3 server."""
    with s3_server("corpora"):
        for path in Path(local.location).iterdir():
            s3_client().upload_file(str(path), "corpora", f"mail/{path.name}")
        yield "s3://corpora/mail"


@pytest.mark.slow
def test_expired_credentials_are_renewed(
    bucket: str, expected: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    credentials = tmp_path / "credentials"

    def write(key: str) -> None:
        credentials.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")

    def expires(path: str, authorization: str) -> str | None:
        if path.endswith(shard_name(1)) and "Credential=OLD/" in authorization:
            write("NEW")
            return "expired"
        return None

    write("OLD")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    with faulty_proxy(expires) as proxy, Corpus(bucket, remote=S3) as corpus:
        assert [corpus.read_content(block)[0] for block in range(len(corpus))] == expected
    assert proxy.injected["expired"] >= 1


@pytest.mark.slow
def test_missing_credentials_are_named_at_once(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(CorpusError, match=r"manifest.json cannot be read: NoCredentialsError: Unable to locate"):
        Corpus(bucket, remote=PATIENT)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["missing", "denied", "busy", "broken", "cut"])
def test_passing_fault_of_s3_is_retried(bucket: str, expected: list[bytes], fault: str):
    answers = iter([fault, fault])
    proxy = faulty_proxy(lambda path, _: next(answers, None) if path.endswith(".tar") else None)
    with proxy as faulty, Corpus(bucket, remote=S3) as corpus:
        assert corpus.read_content(3, through=9)[0] == expected[3]
    assert faulty.injected[fault] == 2


def held(cache: Path) -> list[Path]:
    return sorted(cache.glob("spans/*/*"))


def cached(folder: Path, **more: int) -> RemoteConfig:
    return FAST.model_copy(update={"cache": str(folder), "memory_bytes": 0, **more})


@pytest.mark.slow
def test_a_cache_leaves_free_space_on_its_disk(
    server: FaultyServer, expected: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Other programs left less space than the reserve, so the cache keeps nothing. Reading continues."""
    with Corpus(server.url, remote=cached(tmp_path, cache_reserve_bytes=1 << 60)) as corpus:
        assert [corpus.read_content(block)[0] for block in range(len(corpus))] == expected
    assert held(tmp_path) == []
    assert list(tmp_path.glob("indexes/*.npy")) == []
    assert ["bytes free" in record.message for record in caplog.records] == [True]


@pytest.mark.slow
def test_cache_drops_its_oldest_blocks_on_a_full_disk(
    server: FaultyServer,
    expected: list[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """The disk has room for 40,000 bytes, but reports more. A write beyond that stores only a part."""
    room, write_bytes = 40_000, Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        left = room - sum(other.stat().st_size for other in held(tmp_path))
        if path.is_relative_to(tmp_path / "spans") and len(content) > left:
            write_bytes(path, content[: max(0, left)])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    with Corpus(server.url, remote=cached(tmp_path)) as corpus:
        for block, raw in enumerate(expected):
            assert corpus.read_content(block)[0] == raw
            assert not [path for path in held(tmp_path) if path.name.endswith(".partial")]
        before = sum(server.requests.values())
        assert corpus.read_content(len(corpus) - 1)[0] == expected[-1]
        assert sum(server.requests.values()) == before  # the newest block was kept
    assert caplog.records == []


KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.storage.remote import RemoteConfig
def write(path, content):
    with open(path, "wb") as file:
        file.write(content[:10])
    os.kill(os.getpid(), signal.SIGKILL)
with Corpus(sys.argv[1], remote=RemoteConfig(cache=sys.argv[2] or None)) as corpus:
    if not sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    Path.write_bytes = write
    corpus.read_content(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_cache", [False, True])
def test_killed_process_leaves_no_files_behind(
    server: FaultyServer, expected: list[bytes], tmp_path: Path, with_cache: bool
):
    temporary, cache = tmp_path / "temporary", tmp_path / "cache"
    temporary.mkdir()
    script = [sys.executable, "-c", KILLED, server.url, str(cache) if with_cache else ""]
    assert subprocess.run(script, check=False, env={**os.environ, "TMPDIR": str(temporary)}).returncode == -9
    assert list(temporary.iterdir()) == []
    if with_cache:
        assert [path.name.endswith(cache_module.PARTIAL) for path in held(cache)] == [True]
        with Corpus(server.url, remote=cached(cache)) as corpus:
            assert held(cache) == []
            assert corpus.read_content(0)[0] == expected[0]
