"""Runs whose ranks are killed or whose disk is full resume; `python -m tests.faults` tests many more."""

import re
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain.checkpoint import CheckpointStore
from tests.faults import EVERY, KINDS, FaultHarness, Setup, Trap

SETUPS = (Setup("zero2", 2), Setup("fsdp", 3))
SHORT = ("mid-file", "during deletion", "during load", "infinite moment")
"""Kinds of `make test`. The others kill at a neighboring moment, or are checked by tests/pretrain/checkpoint too."""
SEED = 0
"""Seed of the rounds. `make faults` draws another one each time."""


@pytest.fixture(scope="module")
def harness(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FaultHarness:
    return FaultHarness(tmp_path_factory.mktemp("faults"), corpus_folder / "train")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=kind, marks=[] if kind in SHORT else pytest.mark.long)
        for number, kind in enumerate(KINDS)
    ],
)
def test_disturbed_run_resumes_from_its_last_checkpoint(harness: FaultHarness, number: int):
    harness.run_round(SEED, number, SETUPS)


FILE_LIMIT = 64 * 1024
"""Bytes of a file that fit on the full disk of the test below: enough for logs and metrics, not for tensors."""


def limit_file_size_of_rank_1(rank: int, pids: Sequence[int]) -> None:
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))


def test_full_disk_is_reported_and_keeps_the_previous_checkpoint(harness: FaultHarness):
    setup = SETUPS[0]
    harness.kill(setup, "full", Trap("after rename", rank=0, number=1, kills_all=True), grace=0)
    start = harness.start(setup, "full", limit_file_size_of_rank_1)
    assert any(start.finish(grace=2.0))
    for step in (6, 9, 12):
        assert re.search(rf"checkpoint of step 0*{step}: rank 1: \[Errno 27\] File too large", start.output)
    assert "error: cannot write a checkpoint: rank 1: [Errno 27] File too large" in start.output
    assert "Traceback" not in start.output
    folder = harness.run("full").checkpoints
    assert [path.name for path in folder.iterdir()] == [CheckpointStore(folder, keep=1).path(EVERY).name]
    harness.resume_and_compare(setup, "full", harness.reference(setup)[0], bit_for_bit=True)
