"""Damage is found, named, and trained around."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import CorpusError
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.shards import Corpus
from data_pipeline.stream import ByteStream, StreamConfig
from data_pipeline.verify import verify
from data_pipeline.vocabulary import PADDING
from tests.conftest import Run


@pytest.fixture
def copy(corpus: Corpus, tmp_path: Path) -> Path:
    return shutil.copytree(corpus.folder, tmp_path / "copy")


def faults(folder: Path) -> list[str]:
    return verify(folder, threads=2, progress=lambda done: None)


def damage_block(folder: Path, block: int) -> None:
    with Corpus(folder, check_shards=False) as corpus:
        record = corpus.index[block]
        shard = folder / corpus.manifest["shards"][int(record["shard"])]["name"]
        content = bytearray(shard.read_bytes())
        content[int(record["frame_offset"] + record["frame_bytes"] // 2)] ^= 0x10
    shard.write_bytes(content)


def test_a_whole_corpus_has_no_fault(copy: Path):
    assert faults(copy) == []


def test_of_400_flipped_bits_anywhere_none_goes_unnoticed(copy: Path):
    draw = random.Random(0)
    files = sorted(path for path in copy.iterdir())
    assert {path.name for path in files} >= {"manifest.json", "index.npy", "shard-000000.tar"}
    for number in range(400):
        path = files[number % len(files)]
        place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        for _ in range(2):  # there, and back
            with path.open("r+b") as file:
                file.seek(place)
                [byte] = file.read(1)
                file.seek(place)
                file.write(bytes([byte ^ 1 << bit]))
            assert bool(faults(copy)) == (_ == 0), f"bit {bit} of byte {place} of {path.name}"


@pytest.mark.parametrize("name", ["manifest.json", "index.npy", "shard-000001.tar"])
@pytest.mark.parametrize("kind", ["cut", "grown", "gone"])
def test_missing_and_added_bytes_are_found(copy: Path, name: str, kind: str):
    path = copy / name
    if kind == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if kind == "cut" else path.read_bytes() + b"\0")
    [fault, *_] = faults(copy)
    assert name in fault


def test_the_command_names_each_damaged_block(copy: Path, byteloom: Run):
    assert "every byte is as it was written" in byteloom("verify", copy).stderr
    damage_block(copy, 3)
    damage_block(copy, 9)
    done = byteloom("verify", copy, check=False)
    assert done.returncode == 1
    assert [line.split(" of ")[0] for line in done.stderr.splitlines()] == [
        "error: block 000003",
        "error: block 000009",
    ]


def test_a_hole_is_padding_and_nothing_after_it_moves(corpus: Corpus, copy: Path, caplog: pytest.LogCaptureFixture):
    damage_block(copy, 5)
    config = StreamConfig(shards="", lanes=4, bad_blocks=1)
    whole, holed = ByteStream(corpus, config, 200), ByteStream(Corpus(copy), config, 200)
    assert whole.fingerprint == holed.fingerprint
    holes = 0
    for g in range(whole.sequences_per_epoch):
        expected, got = whole[g], holed[g]
        place = 0
        for piece in whole.locate(g):
            there = slice(place, place + piece.length)
            if piece.block == 5:
                assert (got[there] == PADDING).all()
                holes += piece.length
            else:
                np.testing.assert_array_equal(got[there], expected[there])
            place += piece.length
    assert holes > 0
    assert holed.holes == {5}
    assert sum("block 000005" in record.message for record in caplog.records) == 1


def test_a_hole_is_no_target(copy: Path):
    damage_block(copy, 5)
    stream = ByteStream(Corpus(copy), StreamConfig(shards="", lanes=4, bad_blocks=1), 200)
    [g, *_] = [g for g in range(stream.sequences_per_epoch) if any(p.block == 5 for p in stream.locate(g))]
    with Loader(stream, LoaderConfig(), global_batch=1, micro_batch=1, first_sequence=g) as loader:
        [micro] = next(iter(loader)).micro_batches
    np.testing.assert_array_equal(micro.targets, micro.ids != PADDING)
    assert not micro.targets.all()


def test_more_bad_blocks_than_allowed_stop_the_run(copy: Path):
    for block in (2, 5, 8):
        damage_block(copy, block)
    stream = ByteStream(Corpus(copy), StreamConfig(shards="", lanes=4, bad_blocks=2), 200)
    with pytest.raises(CorpusError, match=r"block 00000\d of .* is damaged.*data.bad_blocks allows 2"):
        for g in range(stream.sequences_per_epoch):
            stream[g]


def test_training_goes_around_a_bad_block(copy: Path, byteloom: Run, recipe: Path):
    with Corpus(copy) as corpus:
        stream = ByteStream(corpus, StreamConfig(shards="", lanes=8), 128)
        damage_block(copy, stream.locate(0)[0].block)
    command = ("train", recipe, f"data.shards={copy}", "train.steps=2")
    refused = byteloom(*command, check=False)
    assert refused.returncode == 1
    assert "data.bad_blocks allows 0" in refused.stderr
    said = byteloom(*command, "data.bad_blocks=1", "run.name=around").stderr
    assert "its bytes are left out of the loss" in said
    lines = (recipe.parent / "runs/around/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["masked_bytes"] > 0
