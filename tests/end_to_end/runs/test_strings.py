"""An encoder with a decoder learns to write strings of 64 bytes in reverse, and in capitals with few faults."""

from pathlib import Path

import pytest

from benchmarks.pairs import count_right, train


@pytest.mark.long
@pytest.mark.parametrize(("task", "least"), [("reverse", 200), ("uppercase", 196)])
def test_fresh_strings_are_written_without_a_fault(task: str, least: int, tmp_path: Path):
    """docs/lab/results.md has 500 of 500, and 499 of 500."""
    assert count_right(train(task, tmp_path), task, fresh=200) >= least
