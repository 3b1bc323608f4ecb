"""The report of a preparation: counts by suffix, kind and reason, with examples."""

import json
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.preparation import gather, plan
from data_pipeline.preparation.prepare import PrepareReport
from data_pipeline.preparation.report import EXAMPLES
from data_pipeline.readers.kinds import suffix_of
from tests.conftest import prepare_corpus


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a source tree with a picture, dangling links, and damaged lines."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for number in range(5):
        (tree / f"{number}.py").write_text(f"x = {number}\n")
        (tree / f"link{number}").symlink_to("nowhere")
    Image.new("RGB", (100, 50)).save(tree / "logo.png")
    (tree / "lines.jsonl").write_text('{"text": "a"}\n{"text": \n{"other": 1}\n{"text": "b"}\n')
    (tree / "README").write_text("text")
    (tree / "loop").symlink_to("loop")
    return tree


def test_documents_and_skipped_files_are_counted_by_suffix_with_examples(tree: Path, tmp_path: Path):
    prepare_corpus([tree], tmp_path / "out", skip_bad=True, shard_bytes=4000)
    report = PrepareReport.load(tmp_path / "out/report.json")
    kinds = {(kind.suffix, kind.modality): (kind.documents, kind.raw_bytes) for kind in report.kinds}
    assert kinds == {
        (".png", "image"): (1, 15_000),
        (".py", "code"): (5, 30),
        ("", "text"): (1, 4),
        (".jsonl", "text"): (2, 2),
    }
    assert [kind.suffix for kind in report.kinds] == [".png", ".py", "", ".jsonl"]  # most bytes first
    code = next(kind for kind in report.kinds if kind.suffix == ".py")
    assert len(code.examples) == EXAMPLES
    assert set(code.examples) < {f"tree/{number}.py" for number in range(5)}
    left_out = {(kind.suffix, kind.reason): (kind.documents, kind.examples) for kind in report.left_out_kinds}
    assert left_out == {
        ("", "dangling link"): (6, ["tree/link0", "tree/link1", "tree/link2"]),
        (".jsonl", "damaged"): (1, ["tree/lines.jsonl#000000001"]),
        (".jsonl", "no field"): (1, ["tree/lines.jsonl#000000002"]),
    }
    assert report.left_out == 8


@pytest.mark.slow
def test_report_does_not_depend_on_the_units(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reports = []
    for name, unit_bytes in (("whole", 1 << 20), ("small", 10)):
        monkeypatch.setattr(plan, "UNIT_BYTES", unit_bytes)
        prepare_corpus([tree], tmp_path / name, skip_bad=True, shard_bytes=4000)
        reports.append((tmp_path / name / "report.json").read_text())
    assert reports[0] == reports[1]


def test_dangling_links_do_not_end_the_work(tree: Path, tmp_path: Path):
    (tree / "lines.jsonl").unlink()
    corpus = prepare_corpus([tree], tmp_path / "out")
    assert corpus.manifest["documents"] == 7


def test_a_report_and_shards_of_an_earlier_version_are_read(tree: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gather.DocumentKinds, "sorted", lambda self: [])
    prepare_corpus([tree], tmp_path / "out", skip_bad=True)
    path = tmp_path / "out/report.json"
    tree_of = json.loads(path.read_text())
    del tree_of["kinds"], tree_of["left_out"]
    path.write_text(json.dumps(tree_of))
    report = PrepareReport.load(path)
    assert (report.documents, report.kinds, report.left_out_kinds) == (9, [], [])
    prepare_corpus([tree], tmp_path / "out", skip_bad=True)  # the same sources and options: nothing is done


@pytest.mark.slow
def test_both_tables_are_printed_and_json_has_the_same(tree: Path, tmp_path: Path, byteloom):
    done = byteloom("prepare", tree, "--out", "out", "--skip-bad", "--kind", "code", "--kind", "image", "--json")
    rows = [line.split() for line in done.stderr.splitlines()]
    assert [".png", "image", "1", "15", "kB", "tree/logo.png"] in rows
    assert next(row for row in rows if row[1:3] == ["dangling", "link"])[:4] == ["(none)", "dangling", "link", "6"]
    assert next(row for row in rows if row[1:3] == ["other", "kind"])[0] in (".jsonl", "(none)")
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert {kind["modality"] for kind in report["kinds"]} == {"code", "image"}


@pytest.mark.parametrize(
    ("key", "suffix"),
    [
        ("t/a.PY", ".py"),
        ("t/a.txt.gz", ".txt.gz"),
        ("t/a.jsonl.zst#000000012", ".jsonl.zst"),
        ("a.tar/b.png", ".png"),
        ("t/README", ""),
        ("t/.hidden", ""),
        ("t/a#b.c", ".c"),
        ("t/a." + "x" * 40, ""),
    ],
)
def test_the_suffix_of_a_key(key: str, suffix: str):
    assert suffix_of(key) == suffix
