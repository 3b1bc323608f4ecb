"""Reading of a run: its rows, its resumption, and the proof by its record."""

import itertools
import json
import shutil
from pathlib import Path

import blake3
import numpy as np
import pytest
from pydantic import ValidationError

import data_pipeline.stream.reading as reading_module
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.withdraw import withdraw
from data_pipeline.errors import CorpusError
from data_pipeline.stream.config import DataConfig
from data_pipeline.stream.inspection.explain import explain
from data_pipeline.stream.loader import Loader, LoaderConfig
from data_pipeline.stream.reading import Reading, open_streams, replay
from data_pipeline.stream.record import Record
from data_pipeline.vocabulary import PADDING, SEPARATOR
from tests.conftest import prepare_corpus
from tests.data_pipeline.corpora import damage_block

LENGTH = 700


@pytest.fixture(scope="module")
def folders(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two small corpora."""
    root = tmp_path_factory.mktemp("mixture")
    for folder in sources:
        prepare_corpus([folder], root / folder.name, include=["*.py"], block_bytes=5_000, shard_bytes=60_000)
    return {folder.name: root / folder.name for folder in sources}


def data_config(folders: dict[str, Path], **options: object) -> DataConfig:
    """Mix json and email by 1 to 2; after 30 steps by 3 to 1."""
    mixture = {name: {"shards": str(path), "weight": 2 if name == "email" else 1} for name, path in folders.items()}
    stages = [{"step": 30, "weights": {"json": 3, "email": 1}}]
    return DataConfig.model_validate({"mixture": mixture, "stages": stages, "lanes": 5, **options})


def reading_of(config: DataConfig, global_batch: int | None, record: Record | None = None) -> Reading:
    return Reading(config, open_streams(config, LENGTH), record or Record(), global_batch)


def go(reading: Reading, steps: int, global_batch: int, world_size=1, micro_batch=4, prefetch=3) -> list[np.ndarray]:
    """Return the global batches of the next steps, joined from the micro-batches of all ranks. Advance the reading."""
    loaders = [
        Loader(
            reading.mixture,
            LoaderConfig(threads=2, prefetch=prefetch),
            global_batch=global_batch,
            micro_batch=micro_batch,
            first_sequence=reading.record.next_sequence,
            rank=rank,
            world_size=world_size,
            digest=True,
        ).without(reading.skips)
        for rank in range(world_size)
    ]
    batches = []
    for _ in range(steps):
        parts = [next(loader) for loader in loaders]
        while found := [hole for part in parts for hole in reading.unread(part)]:
            reading.skip(found)
            for loader in loaders:
                loader.read_again(reading.record.next_sequence)
            parts = [next(loader) for loader in loaders]
        micro = sorted((m for part in parts for m in part.micro_batches), key=lambda m: m.index)
        batches.append(np.concatenate([m.ids for m in micro]))
        for other in parts[1:]:
            parts[0].micro_batches.extend(other.micro_batches)
        reading.advance(parts[0])
    for loader in loaders:
        loader.close()
    return batches


def digest_of(sequence: int, ids: np.ndarray) -> int:
    """Return a row's digest, as docs/specifications/data.md defines it."""
    row = np.where(ids < SEPARATOR, ids, 0).astype(np.uint8)
    places = [np.flatnonzero(ids == number).astype("<u4") for number in (SEPARATOR, PADDING)]
    counts = [len(own).to_bytes(4, "little") for own in places]
    parts = [row, *places, *counts, sequence.to_bytes(8, "little")]
    return int.from_bytes(blake3.blake3(b"".join(bytes(part) for part in parts)).digest(), "little")


def through_json(reading: Reading) -> Record:
    return Record.from_state(json.loads(json.dumps(reading.state())))


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path]) -> tuple[list[np.ndarray], str]:
    """Return an uninterrupted run of 60 steps of 6, which reads the smaller corpus twice, and its digest."""
    reading = reading_of(data_config(folders), 6)
    batches = go(reading, 60, 6)
    assert reading.epochs()["json"] > 2
    return batches, reading.record.digest


SOME_SHAPES = ((1, 1, 5), (7, 4, 2), (1, 6, 1), (7, 1, 3), (1, 4, 3), (7, 6, 2))
"""Prefetched batches, rows of a micro-batch and ranks in `make test`."""
SHAPES = [
    pytest.param(*shape, marks=[] if shape in SOME_SHAPES else pytest.mark.long)
    for shape in itertools.product((1, 7), (1, 4, 6), (1, 2, 3, 5))
]


@pytest.mark.slow
@pytest.mark.parametrize(("prefetch", "micro_batch", "world_size"), SHAPES)
def test_resume_is_exact_at_every_step(folders, whole, world_size: int, micro_batch: int, prefetch: int):
    """Stop after each step, and resume from the record with loaders of another shape.

    The steps cover two epochs and a change of the mixture.
    """
    batches, digest = whole
    config = data_config(folders)
    reading = reading_of(config, 6)
    for step, expected in enumerate(batches):
        [got] = go(reading, 1, 6, world_size, micro_batch, prefetch)
        np.testing.assert_array_equal(got, expected, err_msg=f"step {step}")
        if step % 20 == 19:
            reading = reading_of(config, 6, through_json(reading))
    assert reading.record.digest == digest


def test_another_batch_size_continues_in_the_same_order(folders, whole):
    batches, _ = whole
    config = data_config(folders, stages=[])
    reading = reading_of(config, 6)
    go(reading, 10, 6)
    reading = reading_of(config, 4, through_json(reading))
    rows = np.concatenate(go(reading, 9, 4))
    np.testing.assert_array_equal(rows, np.concatenate(batches)[60:96])
    assert reading.record.batches == [(0, 0, 6), (10, 60, 4)]
    assert reading.sequence_of(10, 5) == 59
    assert reading.sequence_of(11, 0) == 60
    assert reading.sequence_of(19, 3) == 95


def test_stage_begins_at_its_step_for_any_batch_size(folders):
    config = data_config(folders)
    reading = reading_of(config, 6)
    go(reading, 20, 6)
    reading = reading_of(config, 4, through_json(reading))
    go(reading, 15, 4)
    assert [(step, sequence) for step, sequence, _ in reading.record.stages] == [(0, 0), (30, 20 * 6 + 10 * 4)]
    counters = reading.mixture.schedule.counters(reading.record.next_sequence)
    assert sum(counters.values()) == reading.record.next_sequence


def test_the_past_of_a_mixture_cannot_be_changed_and_its_future_can(folders):
    reading = reading_of(data_config(folders), 6)
    go(reading, 35, 6)
    record = through_json(reading)
    for stages in ([], [{"step": 30, "weights": {"json": 4}}], [{"step": 20, "weights": {"json": 3, "email": 1}}]):
        with pytest.raises(CorpusError, match="Restore the old weights"):
            reading_of(data_config(folders, stages=stages), 6, through_json(reading))
    then = {"step": 35, "weights": {"email": 0}}
    later = reading_of(data_config(folders, stages=[{"step": 30, "weights": {"json": 3, "email": 1}}, then]), 6, record)
    before = later.mixture.schedule.counters(later.record.next_sequence)
    go(later, 5, 6)
    after = later.mixture.schedule.counters(later.record.next_sequence)
    assert after == {"email": before["email"], "json": before["json"] + 30}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shards": "x"}, "either shards, a corpus, or mixture"),
        ({"mixture": {}}, "either shards, a corpus, or mixture"),
        ({"mixture": {}, "shards": "x"}, "stages change the weights of a mixture"),
        ({"stages": [{"step": 5, "weights": {"jsn": 1}}]}, "names jsn, which is no source"),
        ({"stages": [{"step": 5, "weights": {}}, {"step": 5, "weights": {}}]}, "in the order of their steps"),
        ({"stages": [{"step": 5, "weights": {"json": 0, "email": 0}}]}, "from step 5 on no source has a weight"),
        ({"stages": [{"step": 5, "weights": {"json": 1e-12}}]}, "json has so little weight"),
        ({"stages": [{"step": 5, "weights": {"json": -1}}]}, "greater than or equal to 0"),
    ],
)
def test_invalid_mixture_is_refused(folders, change, said):
    with pytest.raises(ValidationError, match=said):
        data_config(folders, **change)


@pytest.mark.slow
def test_replay_proves_the_sequences_that_were_read(folders, whole):
    _, digest = whole
    config = data_config(folders)
    reading = reading_of(config, 6)
    go(reading, 7, 6, world_size=3)
    record = through_json(reading)
    assert int(record.digest, 16) == sum(digest_of(g, reading.mixture[g]) for g in range(42)) % 2**256
    assert replay(reading_of(config, None, record), 2, lambda done: None) == record.digest
    assert replay(reading_of(config.model_copy(update={"seed": 1}), None, record), 2, lambda done: None) != digest


@pytest.mark.parametrize("sequences", [1, 64, 128])
def test_replay_of_any_length(folders, sequences: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading_module, "WINDOW", 64 * 8 * LENGTH)  # of which a replay reads 64 at once
    config = data_config(folders, mixture={}, stages=[], shards=str(folders["json"]))
    reading = reading_of(config, sequences)
    go(reading, 1, sequences)
    assert replay(reading_of(config, None, through_json(reading)), 1, lambda done: None) == reading.record.digest


def test_a_hole_that_was_only_read_ahead_is_not_in_the_record(folders, tmp_path: Path):
    folder = shutil.copytree(folders["email"], tmp_path / "email")
    config = DataConfig(shards=str(folder), lanes=1, bad_blocks=1)
    [far] = {piece.block for piece in open_streams(config, LENGTH)["corpus"].order.locate(60)[:1]}
    damage_block(folder, far)
    reading = reading_of(config, 2)
    go(reading, 2, 2)
    reading.mixture.read(np.arange(58, 64))  # a loader's threads may or may not have read it
    assert reading.mixture.streams["corpus"].holes
    assert reading.holes == 0
    assert through_json(reading).holes == {"corpus": []}
    go(reading, 40, 2)
    assert [block for block, _ in through_json(reading).holes["corpus"]] == [far]
    assert reading.holes == 1


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concatenate", "document"])
def test_replay_also_proves_rows_next_to_a_hole_and_a_withdrawn_document(folders, tmp_path: Path, packing: str):
    """Damage and withdrawal happen during a run. The record holds the sequence from which each applies."""
    folder = shutil.copytree(folders["email"], tmp_path / "email")
    config = DataConfig(shards=str(folder), lanes=3, bad_blocks=1, packing=packing)
    reading = reading_of(config, 8)
    intact = np.concatenate(go(reading, 12, 8))
    with Corpus(folder) as corpus:
        key = corpus.read(3).slices[-1].key
        parts = withdraw(corpus, [key], 2, lambda done, total: None)
        assert {part.key for part in parts} == {key}
    pristine = shutil.copytree(folder, tmp_path / "pristine")
    damage_block(folder, 8)
    reading = reading_of(config, 8, through_json(reading))
    epoch = reading.mixture.streams["corpus"].sequences_per_epoch
    go(reading, 2 * epoch // 8, 8)
    record = through_json(reading)
    [(block, since)] = record.holes["corpus"]
    assert block == 8
    assert since >= len(intact)
    [(since, count, _)] = record.withdrawn["corpus"]
    assert (since, count) == (96, len(parts))
    if any(piece.block == 8 for g in range(96) for piece in reading.mixture.streams["corpus"].order.locate(g)):
        with pytest.raises(CorpusError, match="the run read it before sequence"):
            replay(reading_of(config, None, record), 2, lambda done: None)
    again = reading_of(config.model_copy(update={"shards": str(pristine)}), None, record)
    assert replay(again, 2, lambda done: None) == record.digest
    np.testing.assert_array_equal([again.mixture[g] for g in range(96)], intact)
    for g in range(96, record.next_sequence, 3):
        row, named = again.mixture[g], np.zeros(LENGTH, bool)
        for origin in explain(again.mixture, g):
            stretch = slice(origin.start, origin.start + origin.length)
            named[stretch] = True
            assert (row[stretch] == PADDING).all() if origin.masked else (row[stretch] < SEPARATOR).all()
        assert (row[~named] >= SEPARATOR).all()
        np.testing.assert_array_equal(again.mixture.read(np.arange(g, g + 40)).ids[0], row)
    with pytest.raises(CorpusError, match="restore the list"):
        (folder / "withdrawn.json").unlink()
        reading_of(config, 8, record)


@pytest.mark.parametrize("packing", ["concatenate", "document"])
def test_explain_names_every_byte_of_a_row(folders, sources, packing: str):
    reading = reading_of(
        data_config(
            folders, mixture={name: {"shards": str(path), "packing": packing} for name, path in folders.items()}
        ),
        6,
    )
    files = {f"{folder.name}/{path.relative_to(folder)}": path for folder in sources for path in folder.rglob("*.py")}
    for g in (0, 17, 400):
        row = reading.mixture[g]
        named = np.zeros(LENGTH, bool)
        for origin in explain(reading.mixture, g):
            stretch = slice(origin.start, origin.start + origin.length)
            content = files[origin.key].read_bytes()
            begin = origin.document_start
            assert row[stretch].astype(np.uint8).tobytes() == content[begin : begin + origin.length]
            assert origin.key.startswith(origin.source)
            assert f"{folders[origin.source]}/shard-" in origin.block
            assert not origin.masked
            named[stretch] = True
        assert (row[~named] >= SEPARATOR).all()


def test_row_of_a_step_that_was_not_taken_is_refused(folders):
    reading = reading_of(data_config(folders), 6)
    go(reading, 2, 6)
    for step, row in ((0, 0), (3, 0), (1, 6), (1, -1)):
        with pytest.raises(CorpusError, match="is not in "):
            reading.sequence_of(step, row)


def test_a_stage_is_logged_as_it_begins_and_its_weights_are_known(folders, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "data_pipeline")
    reading = reading_of(data_config(folders, stages=[{"step": 2, "weights": {"json": 3, "email": 1}}]), 4)
    assert reading.weights == {"json": 1, "email": 2}
    go(reading, 3, 4)
    assert reading.weights == {"json": 3, "email": 1}
    assert [record.message.partition(",")[0] for record in caplog.records] == ["from step 1 on", "from step 3 on"]
