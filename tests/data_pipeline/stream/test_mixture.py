"""Laws of the schedule of a mixture."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.stream.mixture import Schedule, Stage

weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1.0), st.integers(1, 100)), min_size=1, max_size=6).filter(
    any
)


def schedule(*stages: tuple[int, list[float]]) -> Schedule:
    names = [f"source-{index}" for index in range(len(stages[0][1]))]
    return Schedule(names, [Stage(first, dict(zip(names, shares, strict=True))) for first, shares in stages])


@pytest.mark.slow
@given(shares=weights, count=st.integers(0, 3000))
@settings(max_examples=100, deadline=None)
def test_each_source_is_read_in_its_own_order_and_in_proportion_to_its_weight(shares, count):
    plan = schedule((0, shares))
    sources, numbers = plan.place(np.arange(count))
    counters = plan.counters(count)
    for index, (name, weight) in enumerate(zip(plan.names, shares, strict=True)):
        own = numbers[sources == index]
        np.testing.assert_array_equal(own, np.arange(len(own)))
        assert counters[name] == len(own)
        assert abs(len(own) - count * weight / sum(shares)) <= len(shares)


@pytest.mark.slow
@given(first=weights, changes=st.lists(st.integers(1, 400), min_size=1, max_size=3), data=st.data())
@settings(max_examples=50, deadline=None)
def test_change_of_weights_repeats_and_skips_nothing(first, changes, data):
    later = st.lists(st.floats(0, 1), min_size=len(first), max_size=len(first)).filter(any)
    starts = np.cumsum([0, *changes]).tolist()
    plan = schedule(*zip(starts, [first, *(data.draw(later) for _ in changes)], strict=True))
    count = starts[-1] + 300
    sources, numbers = plan.place(np.arange(count))
    for index, name in enumerate(plan.names):
        own = numbers[sources == index]
        np.testing.assert_array_equal(own, np.arange(len(own)))
        assert plan.counters(count)[name] == len(own)


@given(place=st.integers(0, 2**38 - 1))
def test_slot_is_computed_without_the_slots_before_it(place):
    """The counters before and after any slot differ only by that slot, however far it is."""
    plan = schedule((0, [3, 1, 0.5]))
    [source], [number] = plan.place(np.array([place]))
    before, after = plan.counters(place), plan.counters(place + 1)
    name = plan.names[source]
    assert number == before[name]
    assert after == {**before, name: number + 1}


def test_the_schedule_is_pinned():
    """Golden values. They must not change, or every existing mixture would be reordered on resume."""
    sources, _ = schedule((0, [3, 1, 0.5]), (18, [0, 1, 2])).place(np.arange(27))
    assert sources.tolist() == GOLDEN


@pytest.mark.parametrize("shares", [[1, 1], [1, 1, 1, 1]])
def test_equal_weights_take_turns(shares):
    sources, _ = schedule((0, shares)).place(np.arange(40))
    for turn in sources.reshape(-1, len(shares)):
        assert sorted(turn) == list(range(len(shares)))


GOLDEN = [0, 1, 0, 0, 2, 0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 0, 1, 0, 2, 1, 2, 2, 1, 2, 2, 1, 2]
