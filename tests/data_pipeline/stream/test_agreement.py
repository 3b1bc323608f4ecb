"""Agreement of ranks on damaged blocks: rows, holes, budget and record do not depend on the number of ranks.

In these tests, the ranks are readings and loaders of one process. Each may have its own copy of the corpus.
tests/distributed/test_agreement.py trains on real ranks.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import CorpusError, CorruptBlockError
from data_pipeline.stream.config import DataConfig
from data_pipeline.stream.loader import Loader, LoaderConfig
from data_pipeline.stream.reading import Reading, open_streams, replay
from data_pipeline.stream.record import Record, merged
from data_pipeline.vocabulary import PADDING
from tests.data_pipeline.corpora import damage_block, write_corpus

LENGTH, BATCH = 300, 8


class Ranks:
    """Ranks of a run.

    Args:
        copies: the corpus as each rank sees it.
        record: record to resume from.
    """

    def __init__(self, copies: Sequence[Path], record: Record | None = None, **data: object) -> None:
        self.readings, self.loaders = list[Reading](), list[Loader]()
        for rank, copy in enumerate(copies):
            config = DataConfig.model_validate({"shards": str(copy), "lanes": 5, "bad_blocks": 2, **data})
            own = Record.from_state(json.loads(json.dumps(vars(record)))) if record else Record()
            if rank:
                own.digest = Record().digest
            reading = Reading(config, open_streams(config, LENGTH), own, BATCH)
            loader = Loader(
                reading.mixture,
                LoaderConfig(threads=2, prefetch=3),
                global_batch=BATCH,
                micro_batch=1,
                first_sequence=own.next_sequence,
                rank=rank,
                world_size=len(copies),
                digest=True,
            )
            self.readings.append(reading)
            self.loaders.append(loader)

    def step(self) -> np.ndarray:
        """Take a step on all ranks and return the rows of the global batch."""
        parts = [next(loader) for loader in self.loaders]
        while found := [
            hole for reading, part in zip(self.readings, parts, strict=True) for hole in reading.unread(part)
        ]:
            for reading, loader in zip(self.readings, self.loaders, strict=True):
                reading.skip(found)
                loader.read_again(reading.record.next_sequence)
            parts = [next(loader) for loader in self.loaders]
        for reading, part in zip(self.readings, parts, strict=True):
            reading.advance(part)
        micro_batches = sorted((m for part in parts for m in part.micro_batches), key=lambda m: m.index)
        return np.concatenate([m.ids for m in micro_batches])

    def record(self) -> Record:
        state = merged([reading.state() for reading in self.readings])
        return Record.from_state(json.loads(json.dumps(state)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for reading, loader in zip(self.readings, self.loaders, strict=True):
            loader.close()
            reading.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("agreement") / "corpus"
    write_corpus(folder).close()
    return folder


@pytest.fixture(scope="module")
def damaged(folder: Path) -> Path:
    """Return a copy of the corpus with ten damaged blocks."""
    copy = shutil.copytree(folder, folder.parent / "damaged")
    for block in range(0, 40, 4):
        damage_block(copy, block)
    return copy


def steps_until_too_many_holes(folder: Path, ranks: int) -> tuple[int, list[tuple[int, int]], str]:
    """Return the steps that a run takes, its holes, and the error that ends it."""
    with Ranks([folder] * ranks) as run:
        with pytest.raises(CorruptBlockError) as ended:
            while True:
                run.step()
        assert [reading.holes for reading in run.readings] == [2] * ranks
        return run.record().step, run.record().holes["corpus"], str(ended.value)


@pytest.mark.slow
def test_run_stops_before_the_same_step_with_the_same_holes_on_any_number_of_ranks(damaged: Path):
    alone = steps_until_too_many_holes(damaged, 1)
    assert alone[0] > 2
    assert "data.bad_blocks allows 2 damaged blocks" in alone[2]
    for ranks in (2, 4, 8):
        assert steps_until_too_many_holes(damaged, ranks) == alone


@pytest.mark.slow
@given(faults=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 40)), max_size=4), ranks=st.integers(2, 3))
@settings(max_examples=6, deadline=None)
def test_a_block_that_one_rank_cannot_read_is_skipped_by_all(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, faults: set[tuple[int, int]], ranks: int
):
    """All rows equal those of a process that knows the holes of the record, so a replay proves them."""
    root = tmp_path_factory.mktemp("copies")
    copies = [shutil.copytree(folder, root / str(rank)) for rank in range(ranks)]
    for rank, block in faults:
        damage_block(copies[rank % ranks], block)
    with Ranks(copies, bad_blocks=4) as run:
        batches = [run.step() for _ in range(12)]
        record = run.record()  # checks that the ranks agree
        assert {reading.holes for reading in run.readings} == {len(record.holes["corpus"])}
    assert {block for block, _ in record.holes["corpus"]} <= {block for _, block in faults}
    config = DataConfig(shards=str(folder), lanes=5)
    again = Reading(config, open_streams(config, LENGTH), record, None)
    assert replay(again, 2, lambda done: None) == record.digest
    np.testing.assert_array_equal(np.concatenate(batches), [again.mixture[g] for g in range(12 * BATCH)])


def test_rows_that_were_read_ahead_get_holes_found_before_their_step(folder: Path, tmp_path: Path):
    """Rank 1 cannot read a block of which rank 0 has read rows ahead."""
    copies = [folder, shutil.copytree(folder, tmp_path / "copy")]
    config = DataConfig(shards=str(folder), lanes=5)
    order = open_streams(config, LENGTH)["corpus"].order
    block = next(order.locate(g)[0].block for g in range(1, BATCH, 2))
    damage_block(copies[1], block)
    with Ranks(copies) as run:
        own = next(run.loaders[0])
        assert not any((m.ids == PADDING).any() for m in own.micro_batches)
        run.loaders[0].read_again(0)
        batches = np.concatenate([run.step() for _ in range(6)])
        [(hole, since)] = run.record().holes["corpus"]
    assert hole == block and since < BATCH
    masked = 0
    for g, row in enumerate(batches):
        place = 0
        for piece in order.locate(g):
            there = row[place : place + piece.length]
            assert (there == PADDING).all() if piece.block == block and g >= since else (there != PADDING).all()
            masked += piece.block == block and g % 2 == 0
            place += piece.length
    assert masked


def test_a_resumed_run_counts_earlier_holes(damaged: Path):
    with Ranks([damaged] * 2, bad_blocks=10) as run:
        while not run.readings[0].holes:
            run.step()
        record = run.record()
    known = len(record.holes["corpus"])
    with (
        Ranks([damaged] * 3, record, bad_blocks=known) as resumed,
        pytest.raises(CorpusError, match=f"allows {known} "),
    ):
        for _ in range(200):
            resumed.step()


def test_replay_reads_no_block_after_the_last_sequence(folder: Path, tmp_path: Path):
    """A block without a row of the run does not matter. A hole of the record is part of the proof."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = DataConfig(shards=str(copy), lanes=1)
    order = open_streams(config, LENGTH)["corpus"].order
    damage_block(copy, order.locate(20)[0].block)
    with Ranks([copy] * 2, lanes=1) as run:
        for _ in range(5):
            run.step()
        record = run.record()
    assert len(record.holes["corpus"]) == 1
    read = {piece.block for g in range(record.next_sequence) for piece in order.locate(g)}
    for block in set(range(len(open_streams(config, LENGTH)["corpus"].corpus))) - read:
        damage_block(copy, block)
    again = Reading(config, open_streams(config, LENGTH), record, None)
    assert replay(again, 2, lambda done: None) == record.digest
    damage_block(copy, order.locate(0)[0].block)
    again = Reading(config, open_streams(config, LENGTH), record, None)
    with pytest.raises(CorruptBlockError, match="is damaged"):
        replay(again, 2, lambda done: None)
