"""An encoder with a decoder learns to write strings of 64 bytes in reverse and in capitals, without a fault."""

from pathlib import Path

import pytest

from benchmarks.pairs import TASKS, count_right, train


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_every_fresh_string_is_written_without_a_fault(task: str, tmp_path: Path):
    assert count_right(train(task, tmp_path), task, fresh=200) == 200
