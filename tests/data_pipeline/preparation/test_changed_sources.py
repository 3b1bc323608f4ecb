"""A corpus holds one version of its sources, and no files that `prepare` itself wrote."""

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest

from byteloom.core.storage.state_files import StateFileError
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError
from data_pipeline.preparation.plan import make_plan
from data_pipeline.preparation.prepare import PrepareReport, Task, prepare
from tests.conftest import Run, prepare_corpus, prepare_options


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Five files, and JSON lines."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(5):
        (tree / f"{number}.txt").write_text(f"document {number}")
    (tree / "lines.jsonl").write_text(json.dumps({"text": "a line"}) + "\n")
    return tree


def begin(source: Path | str, out: Path, **options: object) -> None:
    """Begin a preparation, and stop it when the files have been scattered."""

    def stop(done: int, total: int) -> None:
        if any(out.with_name(f"{out.name}.partial").glob("units/*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], out, prepare_options(**options), stop)
    assert not out.exists()


def texts_of(out: Path) -> dict[str, str]:
    with Corpus(out) as corpus:
        blocks = [corpus.read(number) for number in range(len(corpus))]
    return {s.key: block.content[s.start : s.start + s.length].decode() for block in blocks for s in block.slices}


def replace(path: Path, content: str, keeps_time: bool = False) -> None:
    """Replace a file by another of the same size."""
    status = path.stat()
    assert len(content) == status.st_size
    path.write_text(content)
    os.utime(path, ns=(0, status.st_mtime_ns if keeps_time else status.st_mtime_ns + 1))


@pytest.mark.parametrize("deduplicate", [False, True])
def test_a_file_that_changed_since_the_stop_is_named(tree: Path, tmp_path: Path, deduplicate: bool):
    out = tmp_path / "out"
    begin(tree, out, deduplicate=deduplicate)
    replace(tree / "3.txt", "DOCUMENT 3")
    (tree / "4.txt").unlink()
    options = {"deduplicate": deduplicate}
    with pytest.raises(CorpusError) as refused:
        prepare_corpus([tree], out, **options)
    assert f"1 file changed ({tree}/3.txt) and 1 file cannot be found or read ({tree}/4.txt)" in str(refused.value)
    assert "--skip-bad" in str(refused.value)
    assert not out.exists()
    prepare_corpus([tree], out, **options, skip_bad=True)
    expected = {f"tree/{number}.txt": f"document {number}" for number in range(3)}
    assert texts_of(out) == expected | {"tree/lines.jsonl#000000000": "a line"}
    assert PrepareReport.load(out / "report.json").sources[0].left_out == {"changed": 1, "unreadable": 1}


def test_a_changed_container_is_named_and_documents_read_before_are_kept(tree: Path, tmp_path: Path):
    out = tmp_path / "out"
    begin(tree, out)
    replace(tree / "lines.jsonl", json.dumps({"text": "A LINE"}) + "\n")
    with pytest.raises(CorpusError, match=r"1 file changed \(.*/lines\.jsonl\)"):
        prepare_corpus([tree], out)
    prepare_corpus([tree], out, skip_bad=True)
    assert texts_of(out)["tree/lines.jsonl#000000000"] == "a line"


def test_new_files_are_named_and_not_read(tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    out = tmp_path / "out"
    begin(tree, out)
    for number in range(7, 2, -1):
        (tree / f"new-{number}").write_text("new")
    prepare_corpus([tree], out)
    assert f"5 files new ({tree}/new-3, {tree}/new-4, {tree}/new-5, …)" in caplog.text
    assert len(texts_of(out)) == 6


def test_changed_files_of_the_same_size_and_time_make_no_copies(tree: Path, tmp_path: Path):
    """Size and modification time are unchanged. Only the digest of the first reading differs."""
    out = tmp_path / "out"
    begin(tree, out, deduplicate=True)
    for number in range(5):
        replace(tree / f"{number}.txt", "alike now!", keeps_time=True)
    with pytest.raises(CorpusError, match=r"changed: .*\.txt changed while it was prepared"):
        prepare_corpus([tree], out, deduplicate=True)
    prepare_corpus([tree], out, deduplicate=True, skip_bad=True)
    assert texts_of(out) == {"tree/lines.jsonl#000000000": "a line"}


def test_a_file_that_changes_within_a_preparation_is_named(tree: Path, tmp_path: Path):
    """The other tasks of an array do not list the sources again."""
    begin(tree, tmp_path / "out")
    replace(tree / "2.txt", "DOCUMENT 2")
    with pytest.raises(CorpusError, match=r"changed: .*/2\.txt changed since it was listed"):
        prepare([tree], tmp_path / "out", prepare_options(), task=Task(1, 2))


def test_complete_shards_are_merged_also_if_the_sources_changed(tree: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert prepare([tree], out, prepare_options(), task=Task(merges=False)) is None
    replace(tree / "2.txt", "DOCUMENT 2")
    prepare_corpus([tree], out)
    assert texts_of(out)["tree/2.txt"] == "document 2"


def test_a_url_is_identified_by_the_version_that_its_server_states(tmp_path: Path):
    files = fsspec.filesystem("memory")
    out = tmp_path / "out"
    for number in range(3):
        files.pipe(f"/changing/{number}.txt", b"document")
    try:
        begin("memory://changing", out)
        files.pipe("/changing/1.txt", b"DOCUMENT")
        with pytest.raises(CorpusError, match=r"1 file changed \(memory://changing/1\.txt\)"):
            prepare_corpus(["memory://changing"], out)
    finally:
        files.rm("/changing", recursive=True)


@pytest.mark.slow
def test_a_finished_preparation_names_changed_sources(tree: Path, tmp_path: Path, byteloom: Run):
    other = tmp_path / "other.txt"
    other.write_text("never changes")
    command = ("prepare", tree, other, "--out", tmp_path / "out")
    byteloom(*command)
    assert "changed" not in byteloom(*command).stderr
    replace(tree / "3.txt", "DOCUMENT 3")
    assert f"{tree} changed since: {tmp_path}/out has the old content" in byteloom(*command).stderr
    (tree / "3.txt").rename(tmp_path / "3.txt")
    assert f"{tree} changed since" in byteloom(*command).stderr


def test_work_that_an_earlier_version_began_is_refused(tree: Path, tmp_path: Path):
    begin(tree, tmp_path / "out")
    path = tmp_path / "out.partial/plan.json"
    plan = json.loads(path.read_text())
    del plan["format"]
    path.write_text(json.dumps(plan))
    with pytest.raises(StateFileError, match=r"of another version of byteloom; remove .*out\.partial"):
        prepare_corpus([tree], tmp_path / "out")


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_work_folders_of_prepare_are_not_sources(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holdout: float
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jobs").mkdir()
    (tmp_path / "corpus.jobs/0.log").write_text("of an array that prepares it")
    whole = {"tree/" + path.name for path in tree.iterdir()}
    begin(".", Path("corpus"), holdout=holdout)
    for out, seen in (("corpus", 0), ("corpus-2", 1), ("corpus-3", 2)):
        prepare(["."], Path(out), prepare_options(holdout=holdout))
        shutil.rmtree("corpus.jobs", ignore_errors=True)
        report = PrepareReport.load(Path(out, "report.json"))
        assert report.sources[0].files == len(whole)
        assert report.sources[0].left_out["corpus"] == seen


def test_corpus_is_not_a_source(tree: Path, tmp_path: Path):
    prepare_corpus([tree], tmp_path / "corpus")
    with pytest.raises(CorpusError, match="is a corpus that byteloom prepare wrote, not a source"):
        prepare_corpus([tmp_path / "corpus"], tmp_path / "out")
    begin(tree, tmp_path / "out")
    with pytest.raises(CorpusError, match="is a folder of this preparation, not a source"):
        make_plan(
            tmp_path, [f"{tmp_path}/out.partial"], prepare_options(), lambda size: None, [tmp_path / "out.partial"]
        )


def test_out_is_refused_before_anything_is_read(tree: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "link.partial").symlink_to("nowhere")
    for out, why in (
        ("link", "is a link to nowhere, which does not exist"),
        ("tree/0.txt/out", "cannot make the folder"),
    ):
        with pytest.raises(CorpusError, match=why):
            prepare_corpus([tmp_path / "none"], tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "link.partial", "tree"]
