"""Damage is found, named and repaired, and training skips it."""

import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.corpus.blocks import pack_documents
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.index import scan_shard, write_shard
from data_pipeline.corpus.manifest import write_index
from data_pipeline.corpus.tar import TAR_HEADER, shard_name
from data_pipeline.corpus.verify import verify
from data_pipeline.errors import CorpusError, CorruptBlockError
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.vocabulary import PADDING
from tests.conftest import Run
from tests.data_pipeline.corpora import contents, damage_block, documents, faults, flip, mend, write_corpus

INDEX = ["manifest.json", "lengths.npy", "index.npy"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("verify") / "original")


def random_places(folder: Path, count: int, seed: int) -> list[tuple[Path, int, int]]:
    """Return random bits (file, byte, bit), equally many of each file."""
    draw = random.Random(seed)
    files = sorted(folder.iterdir())
    chosen = [files[number % len(files)] for number in range(count)]
    return [(path, draw.randrange(path.stat().st_size), draw.randrange(8)) for path in chosen]


def test_intact_corpus_has_no_fault(copy: Path):
    calls = list[tuple[int, int]]()
    assert verify(copy, threads=3, progress=lambda *call: calls.append(call)) == []
    total = sum(path.stat().st_size for path in copy.glob("*.tar"))
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


@pytest.mark.slow
@pytest.mark.parametrize("flips", [80, pytest.param(400, marks=pytest.mark.long)])
def test_every_flipped_bit_is_found_and_none_is_read(copy: Path, original: Corpus, flips: int):
    expected = [original.read(block) for block in range(len(original))]
    refused = Counter[str]()
    for path, place, bit in random_places(copy, flips, seed=0):
        flip(path, place, bit)
        assert faults(copy), f"bit {bit} of byte {place} of {path.name}"
        try:
            corpus = Corpus(copy)
        except CorpusError:
            refused[path.suffix] += 1
        else:  # a bit of a shard: the other shards are unchanged
            with corpus:
                for block in corpus.blocks_of(int(path.stem.removeprefix("shard-"))):
                    try:
                        assert corpus.read_content(block)[0] == expected[block].content
                        assert corpus.read(block) == expected[block]
                    except CorruptBlockError:
                        refused[path.suffix] += 1
        flip(path, place, bit)
    assert faults(copy) == []
    places = [path.suffix for path, *_ in random_places(copy, flips, seed=0)]
    assert refused[".json"] == places.count(".json")
    assert refused[".npy"] == places.count(".npy")
    assert refused[".tar"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INDEX, shard_name(1)])
@pytest.mark.parametrize("kind", ["cut", "grown", "gone"])
def test_missing_and_added_bytes_are_found_and_repaired(copy: Path, original: Corpus, name: str, kind: str):
    path = copy / name
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if kind == "cut" else path.read_bytes() + b"\0")
    [fault] = faults(copy)
    assert name in fault
    mend(copy, original)
    assert contents(copy) == contents(original.location)


def test_every_fault_is_named(copy: Path):
    damage_block(copy, 3)
    damage_block(copy, 13)
    flip(copy / shard_name(2), 0)
    (copy / shard_name(3)).write_bytes((copy / shard_name(3)).read_bytes()[:5_000])
    (copy / shard_name(4)).unlink()
    (copy / shard_name(5)).write_bytes((copy / shard_name(5)).read_bytes() + b"more")
    (copy / "shard-000999.tar.partial").touch()
    names = [str(copy / shard_name(number)) for number in range(6)]
    stranger, first, second, between, cut, gone, grown = faults(copy)
    assert stranger == f"{copy}/shard-000999.tar.partial is not in manifest.json; remove that file"
    assert first.startswith(f"block 000000-000003 of {names[0]} is damaged")
    assert second.startswith(f"block 000001-000002 of {names[1]} is damaged")
    assert between.startswith(f"{names[2]} is damaged") and "all documents can be read" in between
    assert cut.startswith("block 000003-000001 of ") and "10 of 11 blocks lost" in cut
    assert f"{names[3]} ends before byte" in cut
    assert gone.startswith(f"{names[4]} cannot be read: there is no such file") and "11 of 11 blocks lost" in gone
    assert grown.startswith(f"{names[5]} has ") and "all documents can be read" in grown


def test_shards_are_checked_also_without_an_index(copy: Path):
    (copy / "lengths.npy").unlink()
    flip(copy / "index.npy", 5)
    flip(copy / shard_name(1), 3_000)
    lengths, index, shard = faults(copy)
    assert "lengths.npy cannot be read" in lengths
    assert "index.npy is damaged" in index and "--repair" in index
    assert shard_name(1) in shard


@pytest.mark.parametrize("names", [[name] for name in INDEX] + [INDEX, INDEX[1:]])
@pytest.mark.parametrize("damage", ["flip", "gone"])
def test_manifest_and_index_are_written_again_from_the_tars(
    copy: Path, original: Corpus, names: list[str], damage: str
):
    for name in names:
        flip(copy / name, 300) if damage == "flip" else (copy / name).unlink()
    [said] = mend(copy)
    assert f"content sha256 {original.content_sha256}" in said
    if "manifest.json" not in names:
        assert "as in manifest.json" in said
    elif "index.npy" not in names:
        assert "as in index.npy" in said
    elif damage == "flip":
        assert "with as many blocks as lengths.npy listed" in said
    else:
        assert "it is unknown whether a shard is missing" in said
    assert contents(copy) == contents(original.location)


def test_headers_and_padding_are_repaired_without_a_mirror(copy: Path, original: Corpus):
    record = original.index[15]
    frame_end = int(record["frame_offset"] + record["frame_bytes"])
    flip(copy / shard_name(1), int(record["frame_offset"]) - TAR_HEADER + 100)
    flip(copy / shard_name(1), frame_end + 3)  # padding
    path = copy / shard_name(2)
    flip(path, path.stat().st_size - 100)
    (copy / shard_name(3)).write_bytes((copy / shard_name(3)).read_bytes()[:-1000])  # of the tar's end
    assert len(faults(copy)) == 3
    assert len(mend(copy)) == 3
    assert contents(copy) == contents(original.location)


def test_lost_block_needs_a_mirror_and_the_rest_is_repaired_without(copy: Path, original: Corpus):
    damage_block(copy, 13)
    flip(copy / shard_name(2), 0)
    damaged = (copy / shard_name(1)).read_bytes()
    with pytest.raises(CorpusError, match=r"block 000001-000002 of .* is damaged(.|\n)*--mirror"):
        mend(copy)
    assert (copy / shard_name(1)).read_bytes() == damaged
    assert len(faults(copy)) == 1
    [said] = mend(copy, original)
    assert f"1 of 11 blocks from {original.location}" in said
    assert contents(copy) == contents(original.location)
    assert mend(copy, original) == []


def test_everything_can_be_restored_from_a_mirror(copy: Path, original: Corpus):
    (copy / shard_name(0)).unlink()
    (copy / shard_name(1)).write_bytes((copy / shard_name(1)).read_bytes()[:9_000])
    damage_block(copy, 30)
    (copy / "index.npy").unlink()
    with pytest.raises(CorpusError, match="--mirror"):
        mend(copy)
    mend(copy, original)
    assert contents(copy) == contents(original.location)


def test_a_mirror_restores_a_lost_manifest_and_shard(copy: Path, original: Corpus, tmp_path: Path):
    """Without the manifest and the last shard, the remaining files look complete."""
    sorted(copy.glob("*.tar"))[-1].unlink()
    for name in INDEX:
        (copy / name).unlink()
    other = write_corpus(tmp_path / "other", block_bytes=5_000)
    with pytest.raises(CorpusError, match="is not a mirror of"):
        mend(copy, other)
    mend(copy, original)
    assert contents(copy) == contents(original.location)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "left"),
    [(0, "none"), (3, "none")] + [(lost, left) for lost in (0, 3, 7) for left in ("both", "lengths", "index", "cut")],
)
def test_a_repair_that_may_lose_a_shard_waits_for_a_mirror(copy: Path, original: Corpus, lost: int, left: str):
    """A manifest that cannot be read may have named a shard that is not there."""
    (copy / shard_name(lost)).unlink()
    flip(copy / "manifest.json", 300)
    if left in ("lengths", "none"):
        (copy / "index.npy").unlink()
    if left in ("index", "cut", "none"):
        (copy / "lengths.npy").unlink()
    if left == "cut":
        (copy / "index.npy").write_bytes((copy / "index.npy").read_bytes()[:500])
    before = contents(copy)
    with pytest.raises(CorpusError, match=r"(lists 85 blocks|may be missing)(.|\n)*--mirror"):
        mend(copy)
    assert contents(copy) == before
    mend(copy, original)
    assert contents(copy) == contents(original.location)


@pytest.mark.slow
def test_damage_to_one_index_file_does_not_hide_damage_in_the_other(copy: Path):
    """The header is read first. It is a Python expression, and damage may give it any syntax."""
    (copy / shard_name(3)).unlink()
    (copy / "manifest.json").unlink()
    for place in range(0, 200, 10):
        flip(copy / "lengths.npy", place, bit=0)
        with pytest.raises(CorpusError, match=r"lists \d+ blocks(.|\n)*--mirror"):
            mend(copy)
        flip(copy / "lengths.npy", place, bit=0)


def test_copy_of_a_shard_under_another_number_is_not_a_shard_of_the_corpus(copy: Path, original: Corpus):
    """The number of blocks is right and no number is missing. Only the content differs."""
    blocks = itertools.islice(pack_documents(documents(), 3_000, lambda document, error: None), 11)
    write_shard(copy, 3, blocks, level=3)
    (copy / "manifest.json").unlink()
    before = contents(copy)
    with pytest.raises(CorpusError, match=r"lists other blocks than .*shard-000003.tar has(.|\n)*--mirror"):
        mend(copy)
    assert contents(copy) == before
    mend(copy, original)
    assert contents(copy) == contents(original.location)


def test_skipped_numbers_of_shards_are_no_fault_if_the_index_is_intact(tmp_path: Path):
    folder = tmp_path / "corpus"
    write_corpus(folder)
    (folder / shard_name(3)).unlink()
    numbers = (0, 1, 2, 4, 5, 6, 7)
    write_index(folder, [scan_shard(folder / shard_name(number), lambda size: None) for number in numbers])
    whole = contents(folder)
    (folder / "manifest.json").unlink()
    flip(folder / "index.npy", 1_000)
    mend(folder)
    assert contents(folder) == whole


def test_manifest_is_accepted_only_with_the_bytes_that_were_written(copy: Path, original: Corpus):
    path = copy / "manifest.json"
    path.write_text(json.dumps(original.manifest, indent=2))
    [fault] = faults(copy)
    assert "manifest.json is damaged" in fault
    mend(copy)
    assert contents(copy) == contents(original.location)


def test_two_repairs_exclude_each_other(copy: Path):
    descriptor = os.open(copy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(CorpusError, match="another process is changing"):
        mend(copy)
    os.close(descriptor)
    assert mend(copy) == []


def test_bits_that_zstd_does_not_check_are_repaired(copy: Path, original: Corpus):
    """Bit 4 of a frame's header is unused (RFC 8878, 3.1.1.1.1.3). The table is intact and the tar is not."""
    with Corpus(copy) as corpus:
        begin, _ = corpus.members(13)[2]
        place = int(corpus.index[13]["frame_offset"]) + begin + 4
    flip(copy / shard_name(1), place, bit=4)
    [fault] = faults(copy)
    assert "all documents can be read" in fault
    with pytest.raises(CorpusError, match="bits of a table"):
        mend(copy)
    mend(copy, original)
    assert contents(copy) == contents(original.location)


@pytest.mark.slow
def test_random_damage_is_repaired(copy: Path, original: Corpus):
    whole = contents(original.location)
    for number, (path, place, bit) in enumerate(random_places(copy, 60, seed=1)):
        flip(path, place, bit)
        if number % 3 == 2:  # three at a time
            mend(copy, original)
            assert contents(copy) == whole


@pytest.mark.slow
def test_another_corpus_is_refused_as_a_mirror(copy: Path, tmp_path: Path):
    damage_block(copy, 13)
    other = write_corpus(tmp_path / "other", block_bytes=5_000)
    before = contents(copy)
    with pytest.raises(CorpusError, match="is not a mirror of"):
        mend(copy, other)
    assert contents(copy) == before


REPAIR = """
import sys
from pathlib import Path
from data_pipeline.corpus.repair import repair
print(flush=True)
repair(Path(sys.argv[1]), sys.argv[2], 2, lambda done, total: None)
"""


@pytest.mark.slow
def test_killed_repair_does_no_further_damage(copy: Path, original: Corpus):
    whole = contents(original.location)
    draw = random.Random(0)
    damage_block(copy, 2)
    damage_block(copy, 13)
    (copy / shard_name(2)).unlink()
    (copy / "index.npy").unlink()
    sound = {name for name, content in whole.items() if contents(copy).get(name) == content}
    for _ in range(8):
        command = [sys.executable, "-c", REPAIR, str(copy), original.location]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(draw.uniform(0, 0.03))
            os.kill(process.pid, signal.SIGKILL)
        now = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
        assert all(now[name] == whole[name] for name in sound)
        sound |= {name for name, content in whole.items() if now.get(name) == content}
    mend(copy, original)
    assert contents(copy) == whole


@pytest.mark.slow
def test_command_names_each_damaged_block_and_repairs_it(copy: Path, original: Corpus, byteloom: Run):
    damage_block(copy, 3)
    damage_block(copy, 13)
    done = byteloom("verify", copy, check=False)
    assert done.returncode == 1
    assert [line.split(" of ")[0] for line in done.stderr.splitlines()] == [
        "error: block 000000-000003",
        "error: block 000001-000002",
    ]
    said = byteloom("verify", copy, "--repair", "--mirror", original.location).stderr
    assert "every byte is as it was written" in said
    assert "1 of 11 blocks from" in said
    assert contents(copy) == contents(original.location)


def stream_of(corpus: Corpus, bad_blocks: int) -> ByteStream:
    return ByteStream(corpus, PackingConfig(), 200, lanes=4, seed=0, bad_blocks=bad_blocks)


@pytest.mark.slow
def test_hole_becomes_padding_and_nothing_after_it_moves(copy: Path, original: Corpus):
    damage_block(copy, 5)
    whole, holed = stream_of(original, 1), stream_of(Corpus(copy), 1)
    assert whole.fingerprint == holed.fingerprint
    holes = 0
    for g in range(whole.sequences_per_epoch):
        expected, got = whole[g], holed[g]
        place = 0
        for piece in whole.order.locate(g):
            there = slice(place, place + piece.length)
            if piece.block == 5:
                assert (got[there] == PADDING).all()
                holes += piece.length
            else:
                np.testing.assert_array_equal(got[there], expected[there])
            place += piece.length
    assert holes > 0
    assert set(holed.holes) == {5}
    assert "block 000000-000005" in holed.damage[5]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cut", "unreadable"])
def test_block_that_the_disk_cannot_read_is_a_hole(copy: Path, original: Corpus, kind: str):
    path = copy / shard_name(1)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-9_000])
    else:
        path.unlink()
        path.symlink_to("/proc/self/mem")  # reading an unmapped page is an input/output error, like a bad sector
    corpus = Corpus(copy, check_shards=False)
    with pytest.raises(CorruptBlockError, match=r"block 000001-000010 of .*shard-000001.tar is damaged"):
        corpus.read_content(21)
    whole, holed = stream_of(original, 0), stream_of(corpus, 11)
    for g in range(whole.sequences_per_epoch):
        row, expected = holed[g], whole[g]
        np.testing.assert_array_equal(row[row != PADDING], expected[row != PADDING])
    assert 21 in holed.holes
    assert set(holed.holes) <= set(corpus.blocks_of(1))


def test_missing_shard_is_not_a_hole(copy: Path):
    corpus = Corpus(copy)
    (copy / shard_name(1)).unlink()
    with pytest.raises(CorpusError, match="there is no such file") as refusal:
        corpus.read_content(13)
    assert not isinstance(refusal.value, CorruptBlockError)


@pytest.mark.slow
def test_more_bad_blocks_than_allowed_stop_the_run(copy: Path):
    for block in (2, 5, 8):
        damage_block(copy, block)
    stream = stream_of(Corpus(copy), 2)
    with pytest.raises(CorpusError, match=r"block 000000-00000\d of .* is damaged.*data.bad_blocks allows 2"):
        for g in range(stream.sequences_per_epoch):
            stream[g]


@pytest.mark.slow
def test_training_skips_a_bad_block(copy: Path, byteloom: Run, recipe: Path):
    with Corpus(copy) as corpus:
        stream = ByteStream(corpus, PackingConfig(), 128, lanes=8, seed=0, bad_blocks=0)
        damage_block(copy, stream.order.locate(0)[0].block)
    short = ("train.steps=2", "optimizer.schedule.warmup_steps=1")
    said = byteloom("train", recipe, f"data.shards={copy}", *short, "data.bad_blocks=1").stderr
    assert "the loss does not count its bytes" in said
    lines = (recipe.parent / "runs/run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["masked_bytes"] > 0
