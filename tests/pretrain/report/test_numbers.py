"""Tables of a report, from the journal of a run."""

import math

import pytest

from pretrain.report.numbers import PLACES, POINTS, at_time, sampled, tables_of


def record(step: int, **numbers: float) -> dict[str, float]:
    """Return a line of a step of half a second, with 100 bytes."""
    return {"step": step, "time": 1000.0 + step, "step_seconds": 0.5, "bytes_per_second": 200.0, **numbers}


def test_bytes_and_seconds_add_up_from_the_first_line():
    validated = {"step": 0, "time": 1000.0, "validation/bits_per_byte": 8.0}
    tables = tables_of([validated, *(record(step, loss=float(step)) for step in (1, 2, 3))], 1000.0)
    assert tables["train"] | {name: [] for name in ("step_seconds", "bytes_per_second")} == {
        "step": [1, 2, 3],
        "bytes": [100, 200, 300],
        "seconds": [1.0, 2.0, 3.0],
        "loss": [1.0, 2.0, 3.0],
        "step_seconds": [],
        "bytes_per_second": [],
    }
    assert tables["validation"] == {"step": [0], "bytes": [0], "seconds": [0.0], "validation/bits_per_byte": [8.0]}


def test_a_branch_counts_the_bytes_of_its_parent():
    assert tables_of([record(41), record(42)], 1000.0)["train"]["bytes"] == [4100, 4200]


@pytest.mark.parametrize("steps", [1, POINTS, POINTS + 1, 5 * POINTS + 7])
def test_curves_have_few_points_whose_mean_is_that_of_all_steps(steps: int):
    table = tables_of([record(step, loss=1.0 + step % 7) for step in range(1, steps + 1)], 1000.0)["train"]
    assert len(table["loss"]) == min(steps, POINTS)
    assert table["step"][-1] == steps
    assert all(one < other for place in PLACES for one, other in zip(table[place], table[place][1:], strict=False))
    mean = sum(1.0 + step % 7 for step in range(1, steps + 1)) / steps
    assert math.fsum(table["loss"]) / len(table["loss"]) == pytest.approx(mean, rel=0.02)


def test_numbers_that_are_not_finite_or_missing_leave_gaps():
    table = tables_of([record(1, loss=math.nan), record(2), record(3, loss=2.0)], 1000.0)["train"]
    assert table["loss"] == [None, None, 2.0]


def test_an_event_lies_at_the_last_step_before_it():
    table = tables_of([record(step) for step in (1, 2, 3)], 1000.0)["train"]
    assert at_time(table, -1.0) == {"step": 0, "bytes": 0, "seconds": -1.0}
    assert at_time(table, 1.5) == {"step": 1, "bytes": 100, "seconds": 1.5}


def test_a_sample_has_the_first_and_the_last_row():
    assert sampled(range(100), 5) == [0, 25, 50, 74, 99]
    assert sampled([1, 2], 5) == [1, 2]
    assert tables_of([], 0.0) == {}
