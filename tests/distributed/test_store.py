"""Ranks that save and load together: what one of them finds or cannot do is so for all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import CheckpointError, CheckpointStore, Metadata
from pretrain.distributed.fragments import Fragment, whole
from pretrain.distributed.world import World
from tests.distributed.ranks import on_ranks

RANKS = 3
LENGTH = 1000


def share(tensor: torch.Tensor, world: World) -> list[Fragment]:
    return [whole("model/a", tensor).share(world.rank, world.size)]


def save(store: CheckpointStore, step: int, world: World) -> None:
    store.save(step, share(torch.arange(float(LENGTH)) + step, world), {"step": step})


def fault_of(work: Any) -> str | None:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None


def damage_on_first(world: World, path: Path) -> None:
    """Damages the end of a file, once, while nobody reads it."""

    def damage() -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    world.on_first(damage)


def falls_back(world: World, folder: Path) -> dict[str, Any]:
    """The part of the newest checkpoint that the last rank alone reads is damaged."""
    store = CheckpointStore(folder, keep=3, world=world)
    for step in (1, 2):
        save(store, step, world)
    damage_on_first(world, store.path(2) / "rank-00002.bin")
    live = torch.zeros(LENGTH)
    untouched = []

    def own(checkpoint: Metadata) -> list[Fragment]:
        untouched.append(not live.any())
        return share(live, world)

    metadata = store.load(own, set_aside=True)
    mine = share(live, world)[0]
    expected = torch.arange(mine.start, mine.start + len(mine.data)) + 1.0
    return {
        "step": metadata.state["step"],
        "untouched": untouched,
        "right": torch.equal(mine.data, expected),
        "left": world.on_first(lambda: sorted(path.name for path in folder.iterdir())),
    }


def cannot_save(world: World, folder: Path) -> dict[str, Any]:
    """One rank cannot write."""

    def fence() -> None:
        if world.rank == 1 and fails:
            raise OSError(28, "No space left on device")

    fails = False
    store = CheckpointStore(folder, keep=3, world=world, fence=fence)
    save(store, 1, world)
    fails = True
    fault = fault_of(lambda: save(store, 2, world))
    fails = False
    left = world.on_first(lambda: sorted(path.name for path in folder.iterdir()))
    save(store, 3, world)
    return {"fault": fault, "left": left, "then": [path.name for path in store.committed()]}


def cannot_use(world: World, folder: Path) -> dict[str, Any]:
    """One rank has another model."""
    store = CheckpointStore(folder, keep=3, world=world)
    save(store, 1, world)
    live = torch.zeros(LENGTH)
    other = [whole("model/b" if world.rank == 1 else "model/a", live)]
    fault = fault_of(lambda: store.load(lambda checkpoint: other))
    return {"fault": fault, "untouched": not live.any(), "left": len(store.committed())}


def prunes(world: World, folder: Path) -> list[str]:
    """A later start, which finds one of the checkpoints that are there damaged."""
    store = CheckpointStore(folder, keep=2, world=world)
    for step in (1, 2):
        save(store, step, world)
    damage_on_first(world, store.path(2) / "rank-00001.bin")
    again = CheckpointStore(folder, keep=2, world=world)
    save(again, 3, world)
    return world.on_first(lambda: sorted(path.name for path in folder.iterdir()))


CASES = (falls_back, cannot_save, cannot_use, prunes)


def all_cases(world: World, folder: Path) -> dict[str, Any]:
    return {case.__name__: case(world, folder / case.__name__) for case in CASES}


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(RANKS, all_cases, tmp_path_factory.mktemp("homes"))


def test_all_ranks_fall_back_together_before_anything_is_changed(of_ranks: list[dict[str, Any]]):
    for of_rank in of_ranks:
        assert of_rank["falls_back"] == {
            "step": 1,
            "untouched": [True, True],
            "right": True,
            "left": ["step-00000001", "step-00000002.invalid"],
        }


def test_what_one_rank_cannot_write_is_no_checkpoint_and_the_next_one_is(of_ranks: list[dict[str, Any]]):
    for of_rank in of_ranks:
        told = of_rank["cannot_save"]
        assert told["fault"].endswith("rank 1: [Errno 28] No space left on device")
        assert told["left"] == ["step-00000001"]
        assert told["then"] == ["step-00000001", "step-00000003"]


def test_what_one_rank_cannot_use_is_loaded_by_none(of_ranks: list[dict[str, Any]]):
    for of_rank in of_ranks:
        told = of_rank["cannot_use"]
        assert told["fault"].endswith("belongs to another model: it has no tensor model/b")
        assert (told["untouched"], told["left"]) == (True, 1)


def test_a_damaged_checkpoint_does_not_count_among_those_that_stay(of_ranks: list[dict[str, Any]]):
    for of_rank in of_ranks:
        assert of_rank["prunes"] == ["step-00000001", "step-00000002.invalid", "step-00000003"]
