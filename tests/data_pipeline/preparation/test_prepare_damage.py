"""Preparation with a damaged working folder names the file and what to do. Files get the permissions of the umask."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import data_pipeline.preparation.prepare as module
from byteloom.core.storage.state_files import StateFileError
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError
from data_pipeline.preparation import plan
from data_pipeline.preparation.prepare import prepare
from data_pipeline.preparation.work import WorkerError
from tests.conftest import STDLIB, prepare_options

SOURCES = [STDLIB / "email", STDLIB / "json"]


class StoppedError(Exception):
    """Error with which a test ends a preparation."""


@pytest.fixture(autouse=True)
def _many_units(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "UNIT_BYTES", 100_000)


def go(out: Path, stop: Callable[[Path], bool] = lambda partial: False, workers: int = 1) -> None:
    """Prepare until `stop` returns true for OUT.partial."""

    def progress(done: int, total: int) -> None:
        if stop(out.with_name("out.partial")):
            raise StoppedError

    options = prepare_options(include=["*.py"], shard_bytes=50_000, max_bytes=300_000)
    prepare(SOURCES, out, options, progress, workers)


def has_units(partial: Path) -> bool:
    return len(list((partial / "units").glob("*/unit.json"))) > 2


def has_shards(partial: Path) -> bool:
    return len(list((partial / "shards").glob("*.json"))) > 2


def begun(out: Path, stop: Callable[[Path], bool]) -> Path:
    with pytest.raises(StoppedError):
        go(out, stop)
    return out.with_name("out.partial")


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"\0" * 20, b"[1]", b'{"half'], ids=["empty", "zero", "foreign", "half"])
@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("plan.json", has_units),
        ("units.npy", has_units),
        ("files.jsonl", has_units),
        ("units/000001/unit.json", has_units),
        ("layout.json", has_shards),
        ("runs.npy", has_shards),
    ],
)
def test_a_damaged_working_folder_is_named_and_the_advice_works(
    tmp_path: Path, name: str, stop: Callable[[Path], bool], content: bytes
):
    partial = begun(tmp_path / "out", stop)
    path = partial / name
    path.write_bytes(content if name != "files.jsonl" else content + b"\n")
    with pytest.raises(StateFileError) as caught:
        go(tmp_path / "out")
    said = str(caught.value)
    assert said.startswith(f"{path} is damaged: ") and len(said.splitlines()) == 1
    assert said.endswith(f"; remove {partial} and give the same command again, which then begins from the start")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_damaged_shard_is_rewritten_after_its_mark_is_removed(tmp_path: Path, suffix: str):
    go(tmp_path / "expected/out")
    partial = begun(tmp_path / "out", has_shards)
    mark = partial / "shards/000001.json"
    mark.with_suffix(suffix).write_bytes(b"\0" * 30)
    (partial / "shards/.nfs000012").touch()  # files that other programs leave
    (partial / "units/.nfs000012").touch()
    with pytest.raises(StateFileError) as caught:
        go(tmp_path / "out")
    assert str(caught.value).startswith(f"{mark.with_suffix(suffix)} is damaged: ")
    assert f"; remove {mark} and give the same command again, which then writes that shard again" in str(caught.value)
    mark.unlink()
    go(tmp_path / "out")
    with Corpus(tmp_path / "out") as corpus, Corpus(tmp_path / "expected/out") as expected:
        assert corpus.manifest == expected.manifest


@pytest.mark.parametrize("content", [b"", b"\0\0", b"[]", b'{"parts": 3}'])
def test_a_corpus_with_a_damaged_report_is_refused(tmp_path: Path, content: bytes):
    go(tmp_path / "out")
    (tmp_path / "out/report.json").write_bytes(content)
    with pytest.raises(CorpusError, match="out exists already; choose another --out, or remove that folder first"):
        go(tmp_path / "out")


@pytest.mark.slow
def test_an_unexpected_error_of_a_worker_ends_the_work_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    partial = begun(tmp_path / "out", has_shards)
    for run in partial.glob("units/*/run-*"):
        run.write_bytes(b"")
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    with pytest.raises(WorkerError, match="a worker failed: ValueError: cannot mmap an empty file") as caught:
        go(tmp_path / "out", workers=2)
    assert "in add_run" in "".join(traceback.format_exception(caught.value))


def test_files_of_a_corpus_have_the_permissions_of_the_umask(tmp_path: Path):
    earlier = os.umask(0o027)
    try:
        go(tmp_path / "out")
    finally:
        os.umask(earlier)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path
