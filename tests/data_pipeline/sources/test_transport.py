"""Sources whose transport fails: a fault of a network is never a bad document."""

import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from byteloom.core.faults import in_words
from byteloom.core.retries import RetryPolicy
from data_pipeline.errors import BadDocumentError, CorpusError, UnreachableError
from data_pipeline.readers import ReadOptions, documents_in
from data_pipeline.sources import opening
from data_pipeline.sources.listing import Selection, list_files
from data_pipeline.sources.opening import open_file
from data_pipeline.sources.source_file import SourceFile
from tests.conftest import prepare_corpus
from tests.data_pipeline.corpus.faulty_server import FaultyServer

LINES = 3000
FAST = RetryPolicy(attempts=4, backoff_seconds=0.001, deadline_seconds=60.0)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SOURCE_POLICY", "QUESTION_POLICY"):
        monkeypatch.setattr(opening, name, FAST)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    lines = [json.dumps({"text": f"document {number} " + "x" * (number % 97)}) + "\n" for number in range(LINES)]
    (folder / "x.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder) as server:
        yield server


def texts(url: str) -> list[bytes]:
    found = documents_in(SourceFile(0, url, "x.jsonl", None), ReadOptions())
    return [b"".join(document.read()) for document in found]


@pytest.mark.parametrize("fault", ["drop", "busy", "broken"])
def test_reading_of_a_source_continues_where_a_server_failed(server: FaultyServer, folder: Path, fault: str):
    expected = texts(str(folder / "x.jsonl"))
    answers = iter([fault, fault, None])
    server.fault_of = lambda name: next(answers, None)
    assert texts(f"{server.url}/x.jsonl") == expected
    assert len(expected) == LINES


def test_a_server_without_ranges_is_read_from_the_start(server: FaultyServer, folder: Path):
    answers = iter(["drop", "whole"])
    server.fault_of = lambda name: next(answers, None)
    assert texts(f"{server.url}/x.jsonl") == texts(str(folder / "x.jsonl"))


@pytest.mark.slow
def test_prepare_keeps_every_document_of_a_server_that_fails(server: FaultyServer, folder: Path, tmp_path: Path):
    """The first requests fail. Bad documents may be skipped, but none is."""
    answers = iter(["busy", "busy", "drop", "busy", "drop"])
    server.fault_of = lambda name: next(answers, None)
    for name, source in (("there", f"{server.url}/x.jsonl"), ("here", str(folder / "x.jsonl"))):
        prepare_corpus([source], tmp_path / name, skip_bad=True)
    for name in ("manifest.json", "index.npy"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_server_that_never_answers_is_named_and_no_document_is_skipped(server: FaultyServer):
    server.fault_of = lambda name: "drop" if server.requests[name] == 1 else "busy"
    url = f"{server.url}/x.jsonl"
    with pytest.raises(UnreachableError, match=rf"cannot read {url}: .*attempt 4 of 4.*Start the same command") as told:
        texts(url)
    assert not isinstance(told.value, BadDocumentError)


def test_missing_or_forbidden_file_is_a_bad_document_at_once(server: FaultyServer):
    server.forbidden.add("secret")
    for name in ("secret", "none"):
        with pytest.raises(BadDocumentError, match=rf"cannot read {server.url}/{name}"):
            open_file(f"{server.url}/{name}")
        assert server.requests[name] == 1


@pytest.mark.parametrize("fault", ["missing", "denied"])
def test_a_signature_of_a_source_stays_out_of_messages(server: FaultyServer, tmp_path: Path, fault: str):
    server.fault_of = lambda name: fault
    with pytest.raises(CorpusError, match=f"{server.url}/x.jsonl") as caught:
        prepare_corpus([f"{server.url}/x.jsonl?sig=secret"], tmp_path / "out")
    assert server.paths[-1].endswith("?sig=secret")
    assert "secret" not in str(caught.value)
    assert ("no such file" in str(caught.value)) == (fault == "missing")


def test_messages_omit_the_queries_of_urls():
    error = ValueError("403 for url='https://host/a/b.tar?sig=x&y=z' and http://h?k, why?")
    assert in_words(error) == "ValueError: 403 for url='https://host/a/b.tar' and http://h why?"


def test_a_source_that_changes_while_it_is_read_is_named(server: FaultyServer, folder: Path):
    answers = iter(["drop"])

    def change(name: str) -> str | None:
        fault = next(answers, None)
        if fault is None:
            (folder / "x.jsonl").write_text("another text")
        return fault

    server.fault_of = change
    with pytest.raises(CorpusError, match="has changed while it was read") as told:
        open_file(f"{server.url}/x.jsonl").read()
    assert not isinstance(told.value, BadDocumentError)


def test_stale_handle_of_a_file_server_is_reopened(folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Forgotten(io.FileIO):
        """A file of a server that forgets the first handle after 1,000 bytes."""

        def readinto(self, buffer: Any) -> int:
            opened.add(id(self))
            if len(opened) == 1 and self.tell() >= 1000:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().readinto(memoryview(buffer)[:1000])

    opened = set[int]()
    path = folder / "x.jsonl"
    monkeypatch.setattr(opening.io, "FileIO", Forgotten)
    with open_file(str(path)) as file:
        content = file.read()
    monkeypatch.undo()
    assert content == path.read_bytes()
    assert len(opened) == 2


def test_a_folder_of_a_server_is_listed_after_a_fault(server: FaultyServer):
    answers = iter(["busy", "drop", None])
    server.fault_of = lambda name: next(answers, None)
    [file] = list_files([f"{server.url}/x.jsonl"], Selection())
    assert isinstance(file, SourceFile)
    assert file.key == "x.jsonl"
