"""Ranks that save and load together: a fault that one rank finds is a fault for all."""

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
    """Damage the end of a file once, while no rank reads it."""

    def damage() -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    world.on_first(damage)


def fall_back(world: World, folder: Path) -> dict[str, Any]:
    """Load after damage to the part of the newest checkpoint that only the last rank reads."""
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
    fragment = share(live, world)[0]
    expected = torch.arange(fragment.start, fragment.start + len(fragment.data)) + 1.0
    return {
        "step": metadata.state["step"],
        "untouched": untouched,
        "correct": torch.equal(fragment.data, expected),
        "remaining": world.on_first(lambda: sorted(path.name for path in folder.iterdir())),
    }


def fail_to_save(world: World, folder: Path) -> dict[str, Any]:
    """Save while one rank cannot write."""

    def fence() -> None:
        if world.rank == 1 and fails:
            raise OSError(28, "No space left on device")

    fails = False
    store = CheckpointStore(folder, keep=3, world=world, fence=fence)
    save(store, 1, world)
    fails = True
    fault = fault_of(lambda: save(store, 2, world))
    fails = False
    remaining = world.on_first(lambda: sorted(path.name for path in folder.iterdir()))
    save(store, 3, world)
    return {"fault": fault, "remaining": remaining, "then": [path.name for path in store.committed()]}


def fail_to_load(world: World, folder: Path) -> dict[str, Any]:
    """Load while one rank has another model."""
    store = CheckpointStore(folder, keep=3, world=world)
    save(store, 1, world)
    live = torch.zeros(LENGTH)
    other = [whole("model/b" if world.rank == 1 else "model/a", live)]
    fault = fault_of(lambda: store.load(lambda checkpoint: other))
    return {"fault": fault, "untouched": not live.any(), "remaining": len(store.committed())}


def prune(world: World, folder: Path) -> list[str]:
    """Save in a new start that finds one of the existing checkpoints damaged."""
    store = CheckpointStore(folder, keep=2, world=world)
    for step in (1, 2):
        save(store, step, world)
    damage_on_first(world, store.path(2) / "rank-00001.bin")
    new_start = CheckpointStore(folder, keep=2, world=world)
    save(new_start, 3, world)
    return world.on_first(lambda: sorted(path.name for path in folder.iterdir()))


def save_non_finite(world: World, folder: Path) -> dict[str, Any]:
    """Save while one rank holds a value that is not finite."""
    store = CheckpointStore(folder, keep=1, world=world)
    save(store, 1, world)
    values = torch.arange(float(LENGTH))
    values[LENGTH - 1] = torch.inf  # the last rank's
    store.save(2, share(values, world), {"step": 2})
    live = torch.zeros(LENGTH)
    return {
        "fault": fault_of(store.check_finite),
        "now": store.describe_values(2, share(values, world)),
        "remaining": world.on_first(lambda: sorted(path.name for path in folder.iterdir())),
        "loaded": CheckpointStore(folder, keep=1, world=world).load(lambda checkpoint: share(live, world)).state,
    }


CASES = (fall_back, save_non_finite, fail_to_save, fail_to_load, prune)


def all_cases(world: World, folder: Path) -> dict[str, Any]:
    return {case.__name__: case(world, folder / case.__name__) for case in CASES}


@pytest.fixture(scope="module")
def results_by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(RANKS, all_cases, tmp_path_factory.mktemp("homes"))


def test_all_ranks_fall_back_together_before_any_tensor_changes(results_by_rank: list[dict[str, Any]]):
    for results in results_by_rank:
        assert results["fall_back"] == {
            "step": 1,
            "untouched": [True, True],
            "correct": True,
            "remaining": ["step-00000001", "step-00000002.invalid"],
        }


def test_save_that_fails_on_one_rank_is_no_checkpoint_and_the_next_save_is(results_by_rank: list[dict[str, Any]]):
    for results in results_by_rank:
        result = results["fail_to_save"]
        assert result["fault"].endswith("rank 1: [Errno 28] No space left on device")
        assert result["remaining"] == ["step-00000001"]
        assert result["then"] == ["step-00000001", "step-00000003"]


def test_checkpoint_that_one_rank_cannot_use_is_loaded_by_no_rank(results_by_rank: list[dict[str, Any]]):
    for results in results_by_rank:
        result = results["fail_to_load"]
        assert result["fault"].endswith("belongs to another model: it has no tensor model/b")
        assert (result["untouched"], result["remaining"]) == (True, 1)


def test_damaged_checkpoint_does_not_count_as_kept(results_by_rank: list[dict[str, Any]]):
    for results in results_by_rank:
        assert results["prune"] == ["step-00000001", "step-00000002.invalid", "step-00000003"]


def test_non_finite_value_on_one_rank_separates_the_save_of_all_ranks(results_by_rank: list[dict[str, Any]]):
    for results in results_by_rank:
        text = "there are values that are NaN or infinite in model/a (1) since step 2; all were finite after step 1"
        assert results["save_non_finite"] == {
            "fault": text,
            "now": text,
            "remaining": ["step-00000001", "step-00000002.post-mortem"],
            "loaded": {"step": 1},
        }
