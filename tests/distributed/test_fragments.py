"""What every engine hands out: ranges that make up the model, its moments and memory; and checkpoints of them."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint import CheckpointStore
from pretrain.conformance.engines import load, save
from pretrain.distributed.world import World
from pretrain.engines import Engine, NonFiniteError
from tests.distributed.parity import build, losses, micro_batches
from tests.distributed.ranks import on_ranks

RANKS = 2
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "hsdp": {"name": "hsdp", "shards": 1},
    "zero1": {"name": "zero1"},
    "zero1 in bf16": {"name": "zero1", "precision": "bf16"},
    "zero2": {"name": "zero2"},
    "zero2 offloaded": {"name": "zero2", "offload": True},
    "zero3": {"name": "zero3"},
    "zero3 offloaded": {"name": "zero3", "offload": True},
}
FAMILY = "transformer_xl"  # whose memory is in a checkpoint too
BEFORE, AFTER = range(3), range(3, 6)


def poisoned_step_changes_nothing(it: Engine, world: World) -> bool:
    """Whether a step with a gradient that is not finite is told, and leaves everything as it was."""
    weights = [fragment.data for fragment in it.fragments() if fragment.name.startswith("model/")]
    kept = [data.clone() for data in weights]
    for data in weights:
        data[0] = math.inf
    it.restore(it.counters())
    before = [fragment.data.clone() for fragment in it.fragments()]
    counters = it.counters()
    with pytest.raises(NonFiniteError, match="parameters, the first of which is "):
        it.train_step(micro_batches(BEFORE.stop, world), step=BEFORE.stop, learning_rate=1e-3)
    same = all(torch.equal(b, f.data) for b, f in zip(before, it.fragments(), strict=True))
    for data, values in zip(weights, kept, strict=True):
        data.copy_(values)
    it.restore(it.counters())
    return same and it.counters() == counters


def passes_change_nothing(it: Engine, world: World, folder: Path) -> bool:
    """Whether fragments stay as they are until the update; of a save beside the passes, which is left in a folder."""
    store = CheckpointStore(folder, keep=1, world=world)
    owned = it.owned_fragments()
    before = [fragment.data.clone() for fragment in owned]
    same = []

    def look() -> None:
        store.wait_for_copy()
        same.extend(torch.equal(values, fragment.data) for values, fragment in zip(before, owned, strict=True))

    store.begin(len(BEFORE), owned, {"counters": it.counters()})
    step = len(BEFORE)
    it.train_step(micro_batches(step, world), step=step, learning_rate=1e-3, before_update=look)
    changed = [not torch.equal(values, fragment.data) for values, fragment in zip(before, owned, strict=True)]
    store.finish()
    return all(same) and any(changed)


def on_one_rank(world: World, folder: Path) -> dict[str, Any]:
    """Of every engine: what it owns, losses with and without a checkpoint between, what a bad gradient did."""
    told = {}
    for name, engine in ENGINES.items():
        it = build(FAMILY, world, **engine)
        it.rehearse(2)
        losses(it, BEFORE, world)
        stayed = passes_change_nothing(it, world, folder / name)
        load(it, folder / name)
        owned = [(f.name, f.shape, f.start, len(f.data)) for f in it.owned_fragments()]
        unchanged = poisoned_step_changes_nothing(it, world)
        went_on = losses(it, AFTER, world)
        from_alone = losses(load(build(FAMILY, world, **engine), folder / "alone"), AFTER, world)
        scored = it.nats(micro_batches(0)[0].rows.bytes.astype("int64")).tolist()
        told[name] = {
            "owned": owned, "stayed": stayed, "unchanged": unchanged, "went_on": went_on, "from_alone": from_alone,
            "scored": scored,
        }  # fmt: skip
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """The losses of one process, which left a checkpoint on the way."""
    it = build(FAMILY)
    losses(it, BEFORE)
    save(it, folder / "alone", len(BEFORE))
    return losses(it, AFTER)


@pytest.fixture(scope="module")
def of_ranks(alone: list[float], folder: Path) -> list[dict[str, Any]]:
    return on_ranks(RANKS, on_one_rank, folder)


@pytest.mark.parametrize("name", ENGINES)
def test_owned_fragments_are_every_element_once(of_ranks: list[dict[str, Any]], name: str):
    ranges = defaultdict(list)
    for of_rank in of_ranks:
        for kind, shape, start, length in of_rank[name]["owned"]:
            ranges[kind, tuple(shape)].append((start, start + length))
    whole = {(f.name, f.shape) for f in build(FAMILY).fragments()}
    assert set(ranges) == whole
    for (_, shape), parts in ranges.items():
        ends = [0, *(end for _, end in sorted(parts))]
        assert [start for start, _ in sorted(parts)] == ends[:-1]
        assert ends[-1] == math.prod(shape)


@pytest.mark.parametrize("name", ENGINES)
def test_passes_beside_a_save_change_nothing_of_what_it_copies(of_ranks: list[dict[str, Any]], name: str):
    assert all(of_rank[name]["stayed"] for of_rank in of_ranks)


def tolerance(name: str) -> float:
    return 2e-3 if "bf16" in name else 1e-5


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_goes_on_from_the_checkpoint_of_one_process(
    of_ranks: list[dict[str, Any]], alone: list[float], name: str
):
    for of_rank in of_ranks:
        assert of_rank[name]["from_alone"] == pytest.approx(alone, rel=tolerance(name))


@pytest.mark.parametrize("name", ENGINES)
def test_one_process_goes_on_from_the_checkpoint_of_an_engine(of_ranks: list[dict[str, Any]], folder: Path, name: str):
    it = load(build(FAMILY, precision=ENGINES[name].get("precision", "fp32")), folder / name)
    assert losses(it, AFTER) == pytest.approx(of_ranks[0][name]["went_on"], rel=tolerance(name))


@pytest.mark.parametrize("name", ENGINES)
def test_a_gradient_that_is_not_finite_changes_nothing(of_ranks: list[dict[str, Any]], alone: list[float], name: str):
    for of_rank in of_ranks:
        assert of_rank[name]["unchanged"]
        assert of_rank[name]["went_on"] == pytest.approx(alone, rel=tolerance(name))


@pytest.mark.parametrize("name", ENGINES)
def test_all_ranks_score_alike(of_ranks: list[dict[str, Any]], name: str):
    assert of_ranks[0][name]["scored"] == of_ranks[1][name]["scored"]
