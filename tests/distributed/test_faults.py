"""Runs that are killed or run out of space go on; `python -m tests.faults` does the same to many more."""

import random
import re
import resource
from collections.abc import Sequence
from pathlib import Path

import pytest

from pretrain.checkpoint import CheckpointStore
from tests.faults import EVERY, KINDS, Stand, Trap, Way

WAYS = (Way("zero2", 2), Way("fsdp", 3))
SEED = random.randrange(1_000_000)


@pytest.fixture(scope="module")
def stand(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand(tmp_path_factory.mktemp("faults"), corpus_folder / "train")


@pytest.mark.parametrize("number", range(len(KINDS)), ids=KINDS)
def test_a_killed_run_goes_on_from_its_last_checkpoint(stand: Stand, number: int):
    print(f"seed {SEED}")
    stand.play(SEED, number, WAYS)


FULL = 64 * 1024
"""Bytes of a file that the full disk of the test below still takes: of logs and numbers, not of a rank's tensors."""


def fill_the_disk_of_rank_1(rank: int, pids: Sequence[int]) -> None:
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(stand: Stand):
    way = WAYS[0]
    stand.kill(way, "full", Trap("after rename", rank=0, number=1, kills_all=True), grace=0)
    start = stand.start(way, "full", fill_the_disk_of_rank_1)
    assert any(start.finish(grace=2.0))
    for step in (6, 9, 12):
        assert re.search(rf"checkpoint of step 0*{step}: rank 1: \[Errno 27\] File too large", start.said)
    assert "error: cannot write a checkpoint: rank 1: [Errno 27] File too large" in start.said
    assert "Traceback" not in start.said
    folder = stand.run("full").checkpoints
    assert [path.name for path in folder.iterdir()] == [CheckpointStore(folder, keep=1).path(EVERY).name]
    stand.goes_on(way, "full", stand.reference(way)[0], bit_for_bit=True)
