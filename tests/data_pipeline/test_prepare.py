"""Files to shards and back."""

import io
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.atomic import atomic_folder
from data_pipeline.blocks import pack_documents
from data_pipeline.documents import Document
from data_pipeline.errors import CorpusError, CorruptBlockError
from data_pipeline.shards import Corpus
from tests.conftest import prepare_corpus


def documents_of(corpus: Corpus) -> dict[str, bytes]:
    """Every document, put together from its slices in the order of the corpus."""
    documents: dict[str, bytes] = {}
    for number in range(len(corpus)):
        block = corpus.read(number)
        for part in block.slices:
            assert part.document_offset == len(documents.setdefault(part.key, b""))
            documents[part.key] += block.raw[part.start : part.start + part.length]
    return documents


def files_under(folder: Path) -> dict[str, bytes]:
    return {
        f"{folder.name}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size
    }


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of every awkward kind."""
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


def test_every_document_comes_back_byte_for_byte(tree: Path, tmp_path: Path):
    corpus = prepare_corpus([tree], tmp_path / "out", block_bytes=1000, shard_bytes=8_000)
    assert documents_of(corpus) == files_under(tree)
    assert corpus.manifest["documents"] == 6
    assert len(corpus.manifest["shards"]) > 1


def test_webdataset_reads_every_document(tree: Path, tmp_path: Path):
    corpus = prepare_corpus([tree], tmp_path / "out", block_bytes=1000, shard_bytes=8_000)
    urls = [str(corpus.folder / shard["name"]) for shard in corpus.manifest["shards"]]
    raw = b"".join(
        zstandard.decompress(sample["bytes.zst"]) for sample in webdataset.WebDataset(urls, shardshuffle=False)
    )
    assert raw == b"".join(corpus.read(number).raw for number in range(len(corpus)))


def test_tar_lists_the_members_in_pairs(corpus: Corpus):
    shard = corpus.folder / corpus.manifest["shards"][0]["name"]
    names = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True).stdout.split()
    assert names[:4] == ["000000.bytes.zst", "000000.json", "000001.bytes.zst", "000001.json"]
    assert len(names) == 2 * corpus.manifest["shards"][0]["blocks"]


def test_frames_carry_checksum_and_content_size(corpus: Corpus):
    with tarfile.open(corpus.folder / corpus.manifest["shards"][0]["name"]) as tar:
        frame = tar.extractfile("000000.bytes.zst").read()
    parameters = zstandard.get_frame_parameters(frame)
    assert parameters.has_checksum
    assert parameters.content_size == corpus.index[0]["raw_bytes"]


def test_same_files_give_same_content_whatever_the_compression(tree: Path, tmp_path: Path):
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
    assert not train & held
    assert train | held == everything


@given(
    sizes=st.lists(st.integers(1, 2_500), min_size=1, max_size=12),
    block_bytes=st.integers(1, 1_500),
)
@settings(max_examples=60, deadline=None)
def test_packing_cuts_only_documents_longer_than_a_block(tmp_path_factory, sizes: list[int], block_bytes: int):
    folder = tmp_path_factory.mktemp("pack")
    documents = []
    for number, size in enumerate(sizes):
        path = folder / str(number)
        path.write_bytes(bytes([number]) * size)
        documents.append(Document(str(number), path, size))
    blocks = list(pack_documents(documents, block_bytes))
    assert b"".join(b.raw for b in blocks) == b"".join(bytes([n]) * size for n, size in enumerate(sizes))
    assert all(len(b.raw) <= block_bytes for b in blocks)
    slices = [s for b in blocks for s in b.slices]
    for number, size in enumerate(sizes):
        own = [s for s in slices if s.key == str(number)]
        assert (len(own) == 1) == (size <= block_bytes)
        assert [s.ends for s in own] == [False] * (len(own) - 1) + [True]
        assert sum(s.length for s in own) == size
    for b in blocks:
        assert [s.start for s in b.slices] == [sum(t.length for t in b.slices[:i]) for i in range(len(b.slices))]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda tree: tree / "missing", "no such file or folder"),
        (lambda tree: (tree / "link").symlink_to("nowhere") or tree, "cannot read"),
    ],
)
def test_a_bad_source_is_named_and_leaves_nothing(tree: Path, tmp_path: Path, break_it, message: str):
    out = tmp_path / "out"
    with pytest.raises(CorpusError, match=message):
        prepare_corpus([break_it(tree)], out)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_unreadable_files_can_be_left_out(tree: Path, tmp_path: Path):
    (tree / "link").symlink_to("nowhere")
    corpus = prepare_corpus([tree], tmp_path / "out", skip_unreadable=True)
    assert "tree/link" not in documents_of(corpus)
    assert corpus.manifest["documents"] == 6


def test_an_existing_folder_is_not_touched(tree: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CorpusError, match="exists already"):
        prepare_corpus([tree], out)
    assert not list(out.iterdir())


def test_a_failure_half_way_leaves_nothing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that grows between listing and reading: found while blocks are being written."""
    grown = Document.read

    def read(self: Document):
        if self.key.endswith("one"):
            with self.path.open("ab") as file:
                file.write(b"more")
        return grown(self)

    monkeypatch.setattr(Document, "read", read)
    with pytest.raises(CorpusError, match="changed while it was read"):
        prepare_corpus([tree], tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_every_flipped_bit_of_a_block_is_found(tree: Path, tmp_path: Path):
    corpus = prepare_corpus([tree], tmp_path / "out")
    record = corpus.index[0]
    shard = corpus.folder / "shard-000000.tar"
    whole = shard.read_bytes()
    frame = range(int(record["frame_offset"]), int(record["frame_offset"] + record["frame_bytes"]))
    table = range(int(record["table_offset"]), int(record["table_offset"] + record["table_bytes"]))
    for place in (*frame[:: max(1, len(frame) // 100)], *table[:: max(1, len(table) // 100)]):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        shard.write_bytes(damaged)
        with (
            Corpus(corpus.folder) as reopened,
            pytest.raises(CorruptBlockError, match=r"block 000000 of .*shard-000000"),
        ):
            reopened.read(0)


@pytest.mark.parametrize("name", ["manifest.json", "index.npy"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_manifest_or_index_is_found(tree: Path, tmp_path: Path, name: str, damage: str):
    corpus = prepare_corpus([tree], tmp_path / "out")
    path = corpus.folder / name
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        path.write_bytes(content.replace(b"1", b"2", 1) if name == "manifest.json" else content[:-1] + b"\xff")
    else:
        path.unlink()
    with pytest.raises(CorpusError, match=name):
        Corpus(corpus.folder)


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_missing_or_truncated_shard_is_found_when_the_corpus_is_opened(tree: Path, tmp_path: Path, damage: str):
    corpus = prepare_corpus([tree], tmp_path / "out")
    shard = corpus.folder / "shard-000000.tar"
    if damage == "remove":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(CorpusError, match=r"shard-000000.tar"):
        Corpus(corpus.folder)


def test_two_writers_of_one_folder_do_not_mix(tree: Path, tmp_path: Path):
    with atomic_folder(tmp_path / "out") as staging:
        (staging / "mine").touch()
        with pytest.raises(CorpusError, match="another process is writing"):
            prepare_corpus([tree], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_tar_member_extracts_to_a_frame_that_zstd_opens(corpus: Corpus):
    with tarfile.open(corpus.folder / corpus.manifest["shards"][0]["name"]) as tar:
        frame = tar.extractfile("000001.bytes.zst").read()
    raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(frame)).read()
    assert raw == corpus.read(1).raw
