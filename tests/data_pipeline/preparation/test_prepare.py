"""Preparation of a corpus: every document is read back."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.corpus.blocks import pack_documents
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.documents import Document
from data_pipeline.errors import CorpusError
from data_pipeline.preparation import plan, prepare, spill
from data_pipeline.preparation.prepare import PrepareReport
from data_pipeline.readers.remarks import Remarks
from tests.commands import environment
from tests.conftest import LARGE_DOCUMENT, prepare_corpus, prepare_options


def documents_of(corpus: Corpus) -> dict[str, bytes]:
    """Return every document, joined from its slices, in the order of the corpus."""
    documents: dict[str, bytearray] = {}
    for number in range(len(corpus)):
        block = corpus.read(number)
        for part in block.slices:
            assert part.document_offset == len(documents.setdefault(part.key, bytearray()))
            documents[part.key] += block.content[part.start : part.start + part.length]
    return {key: bytes(content) for key, content in documents.items()}


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        f"{folder.name}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size
    }


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def skipped_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def report_of(out: Path) -> PrepareReport:
    return PrepareReport.load(out / "report.json")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder of awkward files."""
    tree = tmp_path / "tree"
    (tree / "deep/er").mkdir(parents=True)
    (tree / "every-byte.bin").write_bytes(bytes(range(256)) * 3)
    (tree / "long.txt").write_bytes(b"0123456789" * 5_000)
    (tree / "deep/er/ünï — ✓.txt").write_text("grüße\n")
    (tree / "one").write_bytes(b"x")
    (tree / "exactly-a-block").write_bytes(b"b" * 1000)
    (tree / "empty").touch()
    (tree.joinpath("not-utf8-\udcff")).write_bytes(b"name")
    return tree


@pytest.fixture
def mixed(tree: Path, tmp_path: Path) -> tuple[list[Path], dict[str, bytes]]:
    """Return a folder, JSON lines and a tar with documents of several blocks in each, and these documents."""
    letters = random.Random(1).choices("abcdefgh \n", k=40_000)
    texts = ["".join(letters[start : start + 7 * start]) for start in range(1, 300)]
    members = {f"{n:03d}.txt": bytes([n]) * n * 37 for n in range(1, 120)}
    sources = [tree, write_jsonl(tmp_path / "lines.jsonl", texts), write_tar(tmp_path / "members.tar", members)]
    expected = sorted([*files_under(tree).values(), *(text.encode() for text in texts), *members.values()])
    return sources, expected


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make units, runs and pieces so small that a small corpus has many of each."""
    monkeypatch.setattr(plan, "UNIT_BYTES", 2_000)
    monkeypatch.setattr(spill, "BUFFER_BYTES", 20_000)
    monkeypatch.setattr(spill, "LARGE_BYTES", 1_500)
    monkeypatch.setattr(spill, "COPY_BYTES", 700)


def test_every_document_is_read_back_byte_for_byte(tree: Path, tmp_path: Path):
    corpus = prepare_corpus([tree], tmp_path / "out", block_bytes=1000, shard_bytes=8_000)
    assert documents_of(corpus) == files_under(tree)
    assert corpus.manifest["documents"] == 6
    assert len(corpus.manifest["shards"]) > 1


@pytest.mark.slow
def test_folders_lines_and_tars_are_read_back_byte_for_byte(mixed, tmp_path: Path, small_steps):
    sources, expected = mixed
    corpus = prepare_corpus(sources, tmp_path / "out", block_bytes=1000, shard_bytes=20_000)
    assert sorted(documents_of(corpus).values()) == expected
    assert len(corpus.manifest["shards"]) > 10
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "lines.jsonl", "members.tar", "out"}


@pytest.mark.slow
def test_steps_and_shards_of_any_size_give_the_same_documents_in_the_same_order(mixed, tmp_path: Path, monkeypatch):
    orders = []
    for name, unit_bytes, buffer_bytes, large_bytes, shard_bytes in (
        ("whole", 1 << 20, 1 << 20, 1 << 20, 1 << 20),
        ("small", 1_000, 5_000, 100, 1 << 20),
        ("many", 30_000, 50_000, 2_000, 50_000),
    ):
        monkeypatch.setattr(plan, "UNIT_BYTES", unit_bytes)
        monkeypatch.setattr(spill, "BUFFER_BYTES", buffer_bytes)
        monkeypatch.setattr(spill, "LARGE_BYTES", large_bytes)
        orders.append(list(documents_of(prepare_corpus(mixed[0], tmp_path / name, shard_bytes=shard_bytes)).items()))
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.slow
def test_shard_has_about_the_requested_bytes(sources: list[Path], tmp_path: Path):
    corpus = prepare_corpus([*sources, sources[0].with_name("asyncio")], tmp_path / "out", shard_bytes=200_000)
    assert len(corpus.manifest["shards"]) == round(corpus.raw_bytes / 200_000)


def test_content_does_not_depend_on_the_compression(tree: Path, tmp_path: Path):
    fast = prepare_corpus([tree], tmp_path / "fast", level=1)
    small = prepare_corpus([tree], tmp_path / "small", level=19)
    assert fast.content_sha256 == small.content_sha256


def test_seed_shuffles_documents(sources: list[Path], tmp_path: Path):
    orders = [
        list(documents_of(prepare_corpus(sources, tmp_path / str(seed), include=["*.py"], seed=seed)))
        for seed in (0, 1)
    ]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1] != sorted(orders[1])


def test_holdout_parts_are_disjoint_and_complete(corpus_folder: Path, sources: list[Path]):
    train, held = (set(documents_of(Corpus(corpus_folder / part))) for part in ("train", "validation"))
    everything = {key for folder in sources for key in files_under(folder) if key.endswith(".py")}
    everything = {key for key in everything if not key.endswith(f"/{LARGE_DOCUMENT}")}
    assert not train & held
    assert train | held == everything


@pytest.mark.slow
@given(
    sizes=st.lists(st.integers(1, 2_500), min_size=1, max_size=12),
    block_bytes=st.integers(1, 1_500),
)
@settings(max_examples=60, deadline=None)
def test_packing_cuts_only_documents_longer_than_a_block(sizes: list[int], block_bytes: int):
    contents = [bytes([number]) * size for number, size in enumerate(sizes)]
    documents = [
        Document(str(n), "binary", lambda content=content: iter([content])) for n, content in enumerate(contents)
    ]
    blocks = list(pack_documents(documents, block_bytes, pytest.fail))
    assert b"".join(b.content for b in blocks) == b"".join(content + b"\0" for content in contents)
    assert all(b.raw_bytes == sum(s.length for s in b.slices) <= block_bytes for b in blocks)
    slices = [s for b in blocks for s in b.slices]
    for number, size in enumerate(sizes):
        own = [s for s in slices if s.key == str(number)]
        assert (len(own) == 1) == (size <= block_bytes)
        assert [s.ends for s in own] == [False] * (len(own) - 1) + [True]
        assert sum(s.length for s in own) == size
    for b in blocks:
        assert [s.start for s in b.slices] == [sum(t.length + 1 for t in b.slices[:i]) for i in range(len(b.slices))]


class TestCopies:
    def test_the_first_in_the_order_of_the_sources_is_kept(self, tmp_path: Path, small_steps):
        for folder, names in {"b": "xyz", "a": "wxv"}.items():
            (tmp_path / folder).mkdir()
            for name in names:
                (tmp_path / folder / f"{name}.txt").write_text(f"{name}\n" * 400)
        lines = write_jsonl(tmp_path / "lines.jsonl", ["w\n" * 400, "new", "new", "y\n" * 400])
        corpus = prepare_corpus([tmp_path / "b", tmp_path / "a", lines], tmp_path / "out", deduplicate=True)
        kept = documents_of(corpus)
        assert {key for key in kept if "jsonl" not in key} == {"b/x.txt", "b/y.txt", "b/z.txt", "a/v.txt", "a/w.txt"}
        assert Counter(kept.values()) == Counter({f"{n}\n".encode() * 400: 1 for n in "vwxyz"} | {b"new": 1})
        left_out = {line["key"]: line["detail"] for line in skipped_of(tmp_path / "out")}
        assert left_out["a/x.txt"] == "the same bytes as b/x.txt"
        assert len(left_out) == 4
        assert [source.left_out["duplicate"] for source in report_of(tmp_path / "out").sources] == [0, 1, 3]

    @pytest.mark.slow
    def test_no_copy_is_on_both_sides_of_the_split(self, tmp_path: Path, small_steps):
        first = write_jsonl(tmp_path / "first.jsonl", [f"text {n % 150}" for n in range(300)])
        second = write_jsonl(tmp_path / "second.jsonl", [f"text {n}" for n in range(100, 250)])
        options = prepare_options(deduplicate=True, holdout=0.3, shard_bytes=500)
        prepare.prepare([first, second], tmp_path / "out", options, lambda done, total: None)
        train, held = (list(documents_of(Corpus(tmp_path / "out" / part)).values()) for part in ("train", "validation"))
        assert Counter(train + held) == Counter(f"text {n}".encode() for n in range(250))
        assert len(held) > 30

    def test_a_corpus_prepared_later_keeps_each_text_on_its_side(self, tmp_path: Path):
        sides = []
        for name, count in (("once", 100), ("more", 200)):
            lines = write_jsonl(tmp_path / f"{name}.jsonl", [f"text {n}" for n in range(count)])
            options = prepare_options(deduplicate=True, holdout=0.3)
            prepare.prepare([lines], tmp_path / name, options, lambda done, total: None)
            sides.append(set(documents_of(Corpus(tmp_path / name / "validation")).values()))
        assert sides[0] < sides[1]


class TestLimits:
    @pytest.fixture
    def sources(self, tmp_path: Path) -> list[Path]:
        (tmp_path / "files").mkdir()
        for number in range(50):
            (tmp_path / f"files/{number:02d}").write_bytes(b"f" * (100 + number))
        (tmp_path / "files/05").write_bytes(b"")
        return [tmp_path / "files", write_jsonl(tmp_path / "lines.jsonl", ["l" * (n + 1) for n in range(300)])]

    def test_documents_of_each_source(self, sources, tmp_path: Path, small_steps):
        kept = documents_of(prepare_corpus(sources, tmp_path / "out", max_documents=20))
        assert sorted(key for key in kept if key.startswith("files/")) == [
            f"files/{n:02d}" for n in range(21) if n != 5
        ]
        assert sorted(len(c) for key, c in kept.items() if "lines" in key) == list(range(1, 21))
        files, lines = report_of(tmp_path / "out").sources
        assert files.left_out == {"empty": 1, "over the limit": 29}
        assert (files.documents, lines.documents) == (20, 20)

    def test_bytes_of_each_source(self, sources, tmp_path: Path, small_steps):
        kept = documents_of(prepare_corpus(sources, tmp_path / "out", max_bytes=1000))
        # 100 + 101 + … + 109 without 105 is 940, and 110 more do not fit; 1 + 2 + … + 44 is 990.
        assert sorted(key for key in kept if key.startswith("files/")) == [
            f"files/{n:02d}" for n in range(10) if n != 5
        ]
        assert sorted(len(c) for key, c in kept.items() if "lines" in key) == list(range(1, 45))

    def test_limit_above_the_size_of_a_source_takes_everything(self, sources, tmp_path: Path):
        limited = prepare_corpus(sources, tmp_path / "limited", max_documents=300, max_bytes=10**6)
        assert limited.content_sha256 == prepare_corpus(sources, tmp_path / "all").content_sha256

    def test_limits_do_not_depend_on_the_order_of_the_units(self, sources, tmp_path: Path, small_steps):
        reports = []
        for begin in range(4):
            out = tmp_path / f"out{begin}"
            options = prepare_options(max_documents=27, max_bytes=2500, skip_bad=True)
            task = prepare.Task(begin, 4)
            prepare.prepare(sources, out, options, lambda done, total: None, task=task)
            reports.append((Corpus(out).content_sha256, (out / "report.json").read_text(), skipped_of(out)))
        assert reports.count(reports[0]) == 4


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda tree: tree / "missing", "no such file or folder"),
        (lambda tree: os.mkfifo(tree / "pipe") or tree, "unreadable: .*tree/pipe: not a regular file"),
        (lambda tree: write_jsonl(tree.with_name("blank.jsonl"), ["", ""]), "the corpus is empty"),
    ],
)
def test_bad_source_is_named_and_leaves_no_files(tree: Path, tmp_path: Path, break_it, message: str):
    out = tmp_path / "out"
    with pytest.raises(CorpusError, match=message):
        prepare_corpus([break_it(tree)], out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.png"])
def test_a_corpus_of_damaged_files_only_names_the_damage(tmp_path: Path, name: str):
    """Containers are read before the layout is computed, other files after it."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(b"{not a picture\n")
    with pytest.raises(CorpusError, match=rf"the corpus is empty: .*; left out: 1 damaged, such as .*source/{name}"):
        prepare_corpus([tmp_path / "source"], tmp_path / "out", skip_bad=True)


@pytest.mark.slow
def test_skipped_files_are_reported_by_name_and_counted(tree: Path, tmp_path: Path, byteloom):
    (tree / "link").symlink_to("nowhere")
    (tree / "lines.jsonl").write_text('{"text": "good"}\n{"text": \n{"other": 1}\n{"text": ""}\n')
    done = byteloom("prepare", "tree", "--out", "out", "--skip-bad")
    assert "damaged" in done.stderr
    assert "dangling link" in done.stderr
    corpus = Corpus(tmp_path / "out")
    assert "tree/link" not in documents_of(corpus)
    assert corpus.manifest["documents"] == 7
    [source] = report_of(tmp_path / "out").sources
    assert source.documents == 7
    assert source.raw_bytes == corpus.raw_bytes
    assert source.left_out == Counter(line["reason"] for line in skipped_of(tmp_path / "out"))
    assert source.left_out["dangling link"] == 1
    assert source.left_out.total() == 5


def test_a_bad_document_stops_the_work_which_continues_without_it(tree: Path, tmp_path: Path):
    write_jsonl(tree / "bad.jsonl", ["good", "better"]).open("a").write("{")
    out = tmp_path / "out"
    with pytest.raises(CorpusError, match=r"^damaged: .*bad.jsonl.*; --skip-bad .*the same command continues$"):
        prepare_corpus([tree], out)
    corpus = prepare_corpus([tree], out, skip_bad=True)
    assert corpus.manifest["documents"] == 8
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_changes_after_the_listing_is_found(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
):
    monkeypatch.setattr(prepare, "SMALL_BYTES", 0)
    made = prepare.make_layout
    monkeypatch.setattr(prepare, "make_layout", lambda plan: (made(plan), (tree / "one").write_text("more")))
    with pytest.raises(
        CorpusError, match=r"^damaged: .*one changed since it was listed: it had 1 byte then and has 4 now"
    ):
        prepare.prepare([tree], tmp_path / "out", prepare_options(), lambda done, total: None, workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_warning_of_a_library_is_logged_once_with_the_files_name(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
):
    monkeypatch.setattr(Remarks, "_files", 0)  # files of other tests of this process
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0")
    prepare.prepare([path], tmp_path / "out", prepare_options(), lambda done, total: None, workers)
    assert [message.partition(":")[0] for message in caplog.messages] == [f"{path} was decoded with a warning"]
    assert capfd.readouterr().err == ""


def test_existing_folder_is_not_changed(tree: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CorpusError, match="exists already"):
        prepare_corpus([tree], out)
    assert not list(out.iterdir())


def test_second_preparation_of_a_finished_corpus_does_nothing(tree: Path, tmp_path: Path):
    out = tmp_path / "out"
    options = prepare_options()
    once = prepare.prepare([tree], out, options, lambda done, total: None)
    before = {path: path.stat() for path in out.rglob("*")}
    again = prepare.prepare([tree], out, options, lambda done, total: None)
    assert again.was_finished
    assert again.documents == once.documents
    assert {path: path.stat() for path in out.rglob("*")} == before
    with pytest.raises(CorpusError, match="exists already"):
        prepare.prepare([tree], out, prepare_options(seed=1), lambda done, total: None)


def test_unfinished_work_is_not_continued_with_other_options(tree: Path, tmp_path: Path):
    write_jsonl(tree / "bad.jsonl", []).write_text("{")
    with pytest.raises(CorpusError, match="damaged"):
        prepare_corpus([tree], tmp_path / "out", seed=3)
    with pytest.raises(CorpusError, match=r"other sources or options \(seed: 3 -> 4, block_bytes: 1048576 -> 1000\)"):
        prepare_corpus([tree], tmp_path / "out", seed=4, block_bytes=1000)
    with pytest.raises(CorpusError, match="other sources or options"):
        prepare_corpus([tree / "deep"], tmp_path / "out", seed=3)
    assert prepare_corpus([tree], tmp_path / "out", seed=3, skip_bad=True).manifest["documents"] == 6


PEAK = """
import re, sys
from pathlib import Path
from data_pipeline.preparation import spill
from data_pipeline.preparation.prepare import PrepareOptions, prepare
spill.BUFFER_BYTES = 8 << 20
options = PrepareOptions(shard_bytes=16 << 20, level=1)
prepare(sys.argv[2:], Path(sys.argv[1]), options, lambda done, total: None)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
"""Not ru_maxrss, which a process takes over from the one that started it."""


def peak_memory(out: Path, *sources: Path) -> int:
    """Return the peak memory of a process that prepares sources, with its libraries, in bytes."""
    command = [sys.executable, "-c", PEAK, str(out), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    return int(done.stdout) << 10


@pytest.mark.slow
def test_document_larger_than_memory_is_streamed(tmp_path: Path):
    """Peak memory is far below the 300 MB of either document."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(300 << 20)
    subprocess.run(["tar", "cf", "sparse.tar", "sparse"], cwd=tmp_path, check=True)
    assert peak_memory(tmp_path / "out", tmp_path / "sparse", tmp_path / "sparse.tar") < 150 << 20
    assert Corpus(tmp_path / "out").raw_bytes == 600 << 20


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path):
    peaks = []
    for count in (8_000, 24_000):  # texts of 2,048 bytes: two buffers and one shard, and three times as many
        source = write_jsonl(tmp_path / f"{count}.jsonl", [f"{n:08d}" * 256 for n in range(count)])
        peaks.append(peak_memory(tmp_path / f"out{count}", source))
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 120 << 20
