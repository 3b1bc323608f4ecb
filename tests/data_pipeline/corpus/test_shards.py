"""Shard format: Byteloom and other tools read back exactly what was written."""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard

from byteloom.core.storage.open_files import budget
from data_pipeline.corpus.blocks import StoredBlock
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.index import ShardIndex, scan_shard
from data_pipeline.corpus.tar import MEMBERS, TAR_HEADER, shard_name
from data_pipeline.errors import CorpusError, CorruptBlockError
from tests.data_pipeline.corpora import damage_block, documents, flip, write_corpus, write_shards

Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("shards") / "corpus")


@pytest.fixture
def copy(written: Corpus, tmp_path: Path) -> Path:
    return shutil.copytree(written.location, tmp_path / "copy")


def shard_paths(corpus: Corpus) -> list[Path]:
    return [Path(corpus.location) / entry["name"] for entry in corpus.manifest["shards"]]


def expected_members(corpus: Corpus, shard: int) -> Members:
    """Return the names and contents of a shard's members that the index states."""
    return [
        (f"{shard:06d}-{ordinal:06d}.{suffix}", content)
        for ordinal, block in enumerate(corpus.blocks_of(shard))
        for suffix, content in zip(MEMBERS, corpus.read_stored(block), strict=True)
    ]


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def read_by_extracting(command: list[str], shard: Path, folder: Path) -> Members:
    folder.mkdir()
    subprocess.run([*command, "-xf", shard], cwd=folder, check=True)
    names = subprocess.run([*command, "-tf", shard], capture_output=True, text=True, check=True).stdout.split()
    return [(name, (folder / name).read_bytes()) for name in names]


@pytest.mark.parametrize("program", ["tar", "bsdtar"])
def test_tar_programs_read_every_member(written: Corpus, program: str, tmp_path: Path):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    for shard, path in enumerate(shard_paths(written)):
        assert read_by_extracting([program], path, tmp_path / str(shard)) == expected_members(written, shard)


@pytest.mark.parametrize("mode", ["r:", "r|"])
def test_tarfile_reads_every_member(written: Corpus, mode: str):
    for shard, path in enumerate(shard_paths(written)):
        with tarfile.open(path, mode) as tar:
            assert [(m.name, tar.extractfile(m).read()) for m in tar] == expected_members(written, shard)


def test_webdataset_reads_one_sample_per_block(written: Corpus):
    urls = [str(path) for path in shard_paths(written)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == len(written)
    for block, sample in enumerate(samples):
        assert StoredBlock(*(sample[suffix] for suffix in MEMBERS)) == written.read_stored(block)


def test_zstd_command_opens_frames_and_tables(written: Corpus, tmp_path: Path):
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    for block in range(len(written)):
        stored = written.read_stored(block)
        for number, content in enumerate((stored.frame, stored.table)):
            (tmp_path / f"{block}-{number}.zst").write_bytes(content)
    subprocess.run(["zstd", "--quiet", "-d", *tmp_path.glob("*.zst")], check=True)
    for block in range(len(written)):
        expected = written.read(block)
        assert (tmp_path / f"{block}-0").read_bytes() == expected.content
        table = json.loads((tmp_path / f"{block}-1").read_bytes())
        assert [entry["key"] for entry in table["documents"]] == [part.key for part in expected.slices]


def test_frames_carry_checksum_and_content_size(written: Corpus):
    for block in range(len(written)):
        parameters = zstandard.get_frame_parameters(written.read_stored(block).frame)
        assert parameters.has_checksum
        lengths = written.lengths[block]
        assert parameters.content_size == int(lengths["raw_bytes"]) + int(lengths["document_ends"])


def test_every_document_is_read_back(written: Corpus):
    found = dict[str, bytes]()
    for number in range(len(written)):
        block = written.read(number)
        content, ends = written.read_content(number, through=number + 3)
        assert content == block.content
        np.testing.assert_array_equal(ends, block.ends)
        for part in block.slices:
            assert part.document_offset == len(found.setdefault(part.key, b""))
            found[part.key] += content[part.start : part.start + part.length]
            following = content[part.start + part.length :][:1]
            assert (following == b"\0") if part.ends else not following
    assert found == {document.key: whole for document in documents() if (whole := b"".join(document.read()))}


def test_the_index_of_a_shard_is_read_from_its_tar(tmp_path: Path):
    for number, shard in enumerate(write_shards(tmp_path / "shards")):
        path = tmp_path / "shards" / shard_name(number)
        sizes = list[int]()
        scanned = scan_shard(path, sizes.append)
        assert scanned.entry == shard.entry
        np.testing.assert_array_equal(scanned.lengths, shard.lengths)
        np.testing.assert_array_equal(scanned.blocks, shard.blocks)
        assert sum(sizes) == path.stat().st_size
        shard.save(tmp_path / "saved")
        assert ShardIndex.load(tmp_path / "saved").entry == shard.entry


@pytest.mark.slow
def test_scan_of_a_shard_finds_every_flipped_bit(copy: Path):
    """The digest of the whole tar is excluded, because a scan has no other digest to compare it with."""
    path = copy / shard_name(1)
    whole = scan_shard(path, lambda size: None)
    size = path.stat().st_size
    for number in range(300):
        place = number * 7_919 % size
        flip(path, place, number % 8)
        try:
            scanned = scan_shard(path, lambda size: None)
        except CorpusError as error:
            assert shard_name(1) in str(error)
        else:  # bits of a compressed table that zstd does not check
            assert (scanned.blocks["content_sha256"] == whole.blocks["content_sha256"]).all()
            assert scanned.entry["sha256"] != whole.entry["sha256"]
        flip(path, place, number % 8)


def test_file_that_is_not_a_shard_is_refused(copy: Path):
    for content in (b"", b"x" * 20_000, bytes(10_240), (copy / shard_name(0)).read_bytes()[:-1]):
        (copy / shard_name(0)).write_bytes(content)
        with pytest.raises(CorpusError, match=shard_name(0)):
            scan_shard(copy / shard_name(0), lambda size: None)


@pytest.mark.slow
def test_members_are_at_the_offsets_of_the_index(written: Corpus):
    for block in range(len(written)):
        record = written.index[block]
        with tarfile.open(shard_paths(written)[int(record["shard"])]) as tar:
            [frame] = [m for m in tar if m.offset_data == record["frame_offset"]]
        assert frame.size == record["frame_bytes"]
        assert frame.offset_data - frame.offset == TAR_HEADER


def test_digests_cover_the_documented_bytes(written: Corpus):
    for entry, path in zip(written.manifest["shards"], shard_paths(written), strict=True):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    for block in range(len(written)):
        read = written.read(block)
        assert written.index[block]["content_sha256"].tobytes() == hashlib.sha256(read.table).digest()
        for part in read.slices:
            own = read.content[part.start : part.start + part.length]
            assert part.sha256 == hashlib.sha256(own).hexdigest()


@pytest.mark.parametrize("name", ["manifest.json", "lengths.npy", "index.npy"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_manifest_or_index_is_refused(copy: Path, name: str, damage: str):
    path = copy / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "flip":
        flip(path, path.stat().st_size // 2)
    else:
        path.unlink()
    with pytest.raises(CorpusError, match=name):
        Corpus(copy)


@pytest.mark.parametrize("damage", ["cut", "remove"])
def test_a_missing_or_cut_shard_is_found_when_a_folder_is_opened(copy: Path, damage: str):
    path = copy / shard_name(1)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(CorpusError, match=shard_name(1)):
        Corpus(copy)


def test_a_damaged_block_is_named_and_the_others_are_read(copy: Path, written: Corpus):
    damage_block(copy, 13)
    with Corpus(copy) as corpus:
        for block in range(len(corpus)):
            if block == 13:
                for read in (corpus.read, corpus.read_content, corpus.read_stored):
                    with pytest.raises(
                        CorruptBlockError, match=r"block 000001-000002 of .*shard-000001.tar is damaged"
                    ):
                        read(block)
            else:
                assert corpus.read_content(block)[0] == written.read_content(block)[0]


@pytest.mark.slow
def test_corpora_share_one_budget_of_open_files(tmp_path: Path):
    """Nine corpora have three times as many shards as files may stay open; five threads read a block of each."""
    first = write_corpus(tmp_path / "0", block_bytes=12_000, blocks_per_shard=1)
    expected = [first.read_content(block)[0] for block in range(len(first))]
    first.close()
    corpora = [Corpus(shutil.copytree(first.location, tmp_path / f"{n}")) for n in range(1, 10)]
    before, (soft, hard) = open_files(), resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 0

    def read(thread: int) -> None:
        nonlocal most
        for block in range(thread, len(expected), 5):
            for corpus in corpora:
                assert corpus.read_content(block)[0] == expected[block]
            most = max(most, open_files() - before)

    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 9 * len(expected) // 2, hard))
    try:
        allowed = budget()
        with ThreadPoolExecutor(5) as pool:
            list(pool.map(read, range(5)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert most <= allowed + 6  # one more for each thread that reads an evicted file, and one for the count
    for corpus in corpora:
        corpus.close()
    assert open_files() <= before


def test_a_process_may_open_as_many_files_as_the_machine_allows():
    script = "import resource; from byteloom.core.storage.open_files import raise_open_file_limit as r; r()"
    script += "; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    command = ["sh", "-c", f"ulimit -S -n 100; {sys.executable} -c '{script}'"]
    soft, hard = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert soft == hard


def test_stale_handle_of_a_file_server_is_reopened(written: Corpus, monkeypatch: pytest.MonkeyPatch):
    expected = written.read_content(3)[0]
    open_file, pread = os.open, os.pread
    opened = list[int]()

    def opening(path: Path, flags: int) -> int:
        opened.append(open_file(path, flags))
        return opened[-1]

    def stale(descriptor: int, *place: int) -> bytes:
        if len(opened) < 3:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(descriptor, *place)

    with Corpus(written.location) as corpus:
        monkeypatch.setattr(os, "open", opening)
        monkeypatch.setattr(os, "pread", stale)
        assert corpus.read_content(3)[0] == expected
    assert len(opened) == 3


def test_index_that_is_truncated_while_a_run_reads_does_no_harm(copy: Path, written: Corpus):
    with Corpus(copy) as corpus:
        for name in ("index.npy", "lengths.npy"):
            os.truncate(copy / name, 0)
        assert [corpus.read_content(block)[0] for block in range(len(corpus))] == [
            written.read_content(block)[0] for block in range(len(written))
        ]
    with pytest.raises(CorpusError, match=r"lengths.npy is damaged"):
        Corpus(copy)


@pytest.mark.slow
def test_reading_does_not_import_torch():
    """A process that only reads or writes shards starts fast and needs little memory."""
    code = "import sys, data_pipeline.corpus.corpus, data_pipeline.corpus.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
