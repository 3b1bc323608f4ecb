"""Skipped sequences: the mapping of steps to sequences, and runs that skip."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.stream.inspection.explain import explain
from data_pipeline.stream.loader import Loader, LoaderConfig
from data_pipeline.stream.reading import Reading, replay
from data_pipeline.stream.skips import Skips
from tests.data_pipeline.stream.test_reading import data_config, digest_of, folders, go, reading_of, through_json

__all__ = ["folders"]

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=8)


@pytest.mark.slow
@given(ranges=RANGES, first=st.integers(0, 80), count=st.integers(1, 50))
def test_taken_sequences_are_those_that_are_not_skipped(ranges: list[tuple[int, int]], first: int, count: int):
    skips = Skips(ranges)
    skipped = {number for begin, length in ranges for number in range(begin, begin + length)}
    left = list(itertools.islice((n for n in itertools.count(first) if n not in skipped), count))
    assert skips.take(first, np.arange(count)).tolist() == left
    assert skips.end(first, count) == left[-1] + 1
    assert skips.before(first) == len([number for number in skipped if number < first])
    assert sum(length for _, length in skips.ranges) == len(skipped)
    assert Skips(skips.ranges).ranges == skips.ranges


@pytest.mark.slow
@given(ranges=RANGES, batches=st.lists(st.integers(0, 7), max_size=9))
def test_end_of_batches_does_not_depend_on_their_sizes(ranges: list[tuple[int, int]], batches: list[int]):
    skips, end = Skips(ranges), 0
    for batch in batches:
        end = skips.end(end, batch)
    assert end == skips.end(0, sum(batches))


class Numbers:
    """Stream whose rows are the numbers of their sequences."""

    sequence_length = 1

    def read_groups(self, groups: list[np.ndarray]) -> list[np.ndarray]:
        return groups


@pytest.mark.slow
@given(
    ranges=RANGES,
    world_size=st.integers(1, 4),
    global_batch=st.integers(1, 7),
    micro_batch=st.integers(1, 4),
)
def test_ranks_read_disjoint_rows_that_are_the_same_for_any_world_size(
    ranges: list[tuple[int, int]], world_size: int, global_batch: int, micro_batch: int
):
    skips, steps = Skips(ranges), 5
    by_batch: list[dict[int, list[int]]] = [{} for _ in range(steps)]
    for rank in range(world_size):
        loader = Loader(
            Numbers(),  # type: ignore[arg-type]
            LoaderConfig(threads=1),
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
        ).without(skips)
        with loader:
            for rows, g in zip(by_batch, loader._batch_starts(0), strict=False):
                rows |= {index: loader._sequences(g, index).tolist() for index in loader._my_micro_batches}
    read = [number for rows in by_batch for index in sorted(rows) for number in rows[index]]
    assert read == skips.take(0, np.arange(steps * global_batch)).tolist()


def skip_next(reading: Reading, global_batch: int) -> list[int]:
    """Skip the next batch as the loop does; return its sequences."""
    with Loader(
        reading.mixture,
        LoaderConfig(threads=1),
        global_batch=global_batch,
        micro_batch=4,
        first_sequence=reading.record.next_sequence,
    ) as loader:
        batch = next(loader.without(reading.skips))
    sequences = reading.skips.take(reading.record.next_sequence, np.arange(global_batch))
    reading.leave_out(batch)
    return sequences.tolist()


def numbers_of(ranges: list[tuple[int, int]]) -> list[int]:
    return [number for first, count in ranges for number in range(first, first + count)]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3])
def test_run_that_skips_reads_the_rest_in_order_and_proves_it(folders: dict[str, Path], world_size: int):
    config = data_config(folders, stages=[{"step": 4, "weights": {"json": 3, "email": 1}}])
    reading = reading_of(config, 6)
    read: list[np.ndarray] = []
    skipped: list[int] = []
    for steps in (2, 1, 1, 3):  # after four steps, a stage has just begun
        read += go(reading, steps, 6, world_size)
        skipped += skip_next(reading, 6)
        reading = reading_of(config, 6, through_json(reading))
    read += go(reading, 3, 6, world_size)
    record = through_json(reading)
    assert record.step == 10 and record.next_sequence == 10 * 6 + len(skipped)
    numbers = [g for g in range(record.next_sequence) if g not in skipped]
    np.testing.assert_array_equal(np.concatenate(read), [reading.mixture[g] for g in numbers])
    assert [reading.sequence_of(step, row) for step in range(1, 11) for row in range(6)] == numbers
    assert int(record.digest, 16) == sum(digest_of(g, reading.mixture[g]) for g in numbers) % 2**256
    past = reading_of(config, None, record)
    assert replay(past, 2, lambda done: None) == record.digest
    assert [number for step in range(1, 11) for number in numbers_of(reading.skipped_at(step))] == skipped
    for g in skipped:
        assert explain(past.mixture, g)
    record.skipped = record.skipped[1:]
    assert replay(reading_of(config, None, record), 2, lambda done: None) != record.digest


def test_resumed_run_reads_what_an_uninterrupted_run_reads_after_a_skip(folders: dict[str, Path]):
    config = data_config(folders, stages=[{"step": 2, "weights": {"json": 3, "email": 1}}])
    whole, resumed = (reading_of(config, 6) for _ in range(2))
    rows: list[list[np.ndarray]] = [[], []]
    for resumes, read in zip((False, True), rows, strict=True):
        reading = resumed if resumes else whole
        for _ in range(4):
            read.extend(go(reading, 1, 6))
            skip_next(reading, 6)
            if resumes:
                reading = reading_of(config, 6, through_json(reading))
        assert reading.record.skipped == [(6, 6), (18, 6), (30, 6), (42, 6)]
    np.testing.assert_array_equal(*rows)


def test_sequences_skipped_ahead_are_not_read(folders: dict[str, Path]):
    """A run that was rewound has the sequences to skip before it reaches them."""
    config = data_config(folders, stages=[])
    live, ahead = reading_of(config, 6), reading_of(config, 6)
    ahead.record.skipped = [(12, 6)]
    ahead = reading_of(config, 6, ahead.record)
    first = go(live, 2, 6)
    skip_next(live, 6)
    np.testing.assert_array_equal(np.concatenate(first + go(live, 3, 6)), np.concatenate(go(ahead, 5, 6, world_size=2)))
    assert live.state() == {**ahead.state(), "digest": live.record.digest}
    assert ahead.sequences_in_all(10) == 66


def test_rows_after_a_skip_do_not_continue_those_before(folders: dict[str, Path]):
    config = data_config(folders, mixture={}, stages=[], shards=str(folders["email"]), lanes=6)
    reading = reading_of(config, 6)
    continues = []
    for step in range(4):
        continues.append(reading.goes_on)
        go(reading, 1, 6)
        if step == 1:
            skip_next(reading, 6)
    assert continues == [False, True, False, True]
