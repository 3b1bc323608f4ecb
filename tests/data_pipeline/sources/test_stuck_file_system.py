"""File systems that fsspec does not run asynchronously: a request without an answer is abandoned at its deadline."""

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from byteloom.core.retries import RetryPolicy
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.storage.remote import RemoteConfig
from data_pipeline.errors import CorpusError, UnreachableError
from data_pipeline.preparation.prepare import PrepareOptions, prepare
from data_pipeline.readers import ReadOptions, document_of
from data_pipeline.sources import opening
from data_pipeline.sources.listing import Selection, list_files

PATIENT = RetryPolicy(30, 0.0, 60.0)


class StuckFile(io.FileIO):
    def read(self, size: int | None = -1) -> bytes:
        StuckFiles.answer()
        return super().read(size)


class StuckFiles(AbstractFileSystem):
    """Local files behind a connection that may not answer, like one of SFTP."""

    protocol = "stuck"
    unanswered: ClassVar[float] = 0
    """Number of the next requests that have no answer."""
    ended = threading.Event()
    connections: ClassVar[list[Any]] = []

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        StuckFiles.connections.append(self)

    @classmethod
    def answer(cls) -> None:
        if cls.unanswered > 0:
            cls.unanswered -= 1
            cls.ended.wait(60)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        status = Path(path).stat()
        kind = "directory" if Path(path).is_dir() else "file"
        return {"name": path, "size": status.st_size, "type": kind, "mtime": status.st_mtime}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        self.answer()
        found = [self.info(str(child)) for child in Path(path).iterdir()]
        return found if detail else [each["name"] for each in found]

    def _open(self, path: str, *_: Any, **__: Any) -> io.FileIO:
        return StuckFile(path)


@pytest.fixture(autouse=True)
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StuckFiles]]:
    fsspec.register_implementation("stuck", StuckFiles, clobber=True)
    monkeypatch.setattr(opening, "READ_SECONDS", 0.2)
    monkeypatch.setattr(opening, "SOURCE_POLICY", RetryPolicy(3, 0.0, 60.0))
    monkeypatch.setattr(opening, "QUESTION_POLICY", PATIENT)
    StuckFiles.clear_instance_cache()
    StuckFiles.unanswered, StuckFiles.ended = 0, threading.Event()
    StuckFiles.connections.clear()
    yield StuckFiles
    StuckFiles.ended.set()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.txt").write_bytes(b"0123456789" * 20_000)
    return tmp_path / "source"


@pytest.mark.slow
def test_a_source_is_read_over_a_new_connection(text: Path, stuck: type[StuckFiles], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opening, "SOURCE_POLICY", PATIENT)
    [file] = list_files([f"stuck://{text}"], Selection())
    before = len(stuck.connections)
    stuck.unanswered = 2
    assert b"".join(document_of(file, ReadOptions()).read()) == b"0123456789" * 20_000
    assert len(stuck.connections) >= before + 2  # on a busy machine, good answers may come too late


@pytest.mark.slow
def test_source_that_never_answers_is_unreachable_and_not_a_bad_document(text: Path, stuck: type[StuckFiles]):
    [file] = list_files([f"stuck://{text}"], Selection())
    stuck.unanswered = 1000
    with pytest.raises(UnreachableError, match=r"AbandonedError: there was no answer for 0.2 s \(attempt 3 of 3\)"):
        list(document_of(file, ReadOptions()).read())


@pytest.mark.slow
def test_a_folder_that_does_not_answer_is_listed_again(text: Path, stuck: type[StuckFiles]):
    stuck.unanswered = 1
    assert [file.key for file in list_files([f"stuck://{text}"], Selection())] == ["source/a.txt"]


def test_a_corpus_is_read_over_a_new_connection(text: Path, stuck: type[StuckFiles]):
    out = text.with_name("corpus")
    prepare([text], out, PrepareOptions())
    with Corpus(out) as corpus:
        expected, _ = corpus.read_content(0)
    remote = RemoteConfig(timeout_seconds=0.2, backoff_seconds=0.0, attempts=30)
    with Corpus(f"stuck://{out}", remote=remote) as corpus:
        before = len(stuck.connections)
        stuck.unanswered = 1
        assert corpus.read_content(0)[0] == expected
        assert len(stuck.connections) > before


@pytest.mark.slow
def test_a_corpus_that_does_not_answer_is_named_and_closes_at_once(text: Path, stuck: type[StuckFiles]):
    out = text.with_name("corpus")
    prepare([text], out, PrepareOptions())
    with Corpus(f"stuck://{out}", remote=RemoteConfig(timeout_seconds=0.2, backoff_seconds=0, attempts=2)) as corpus:
        stuck.unanswered = 1000
        with pytest.raises(CorpusError, match=r"AbandonedError: the answer was not complete after .*attempt 2 of 2"):
            corpus.read_content(0)
    stuck.unanswered = 0
    faults = list[CorpusError]()
    with Corpus(f"stuck://{out}", remote=RemoteConfig(timeout_seconds=60)) as corpus:
        stuck.unanswered = 1000

        def read() -> None:
            with pytest.raises(CorpusError, match="the corpus is closed") as caught:
                corpus.read_content(0)
            faults.append(caught.value)

        reader = threading.Thread(target=read)
        reader.start()
        while stuck.unanswered == 1000:
            time.sleep(0.01)
    reader.join(30)
    assert len(faults) == 1
