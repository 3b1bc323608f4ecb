"""Fragments of every engine: ranges that cover the model, its moments and memory, and checkpoints of them."""

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
FAMILY = "transformer_xl"  # its memory is also in a checkpoint
BEFORE, AFTER = range(3), range(3, 6)


def non_finite_step_changes_nothing(engine: Engine, world: World) -> bool:
    """Return whether a step with a non-finite gradient is reported and changes nothing."""
    weights = [fragment.data for fragment in engine.fragments() if fragment.name.startswith("model/")]
    saved = [data.clone() for data in weights]
    for data in weights:
        data[0] = math.inf
    engine.restore(engine.counters())
    before = [fragment.data.clone() for fragment in engine.fragments()]
    counters = engine.counters()
    with pytest.raises(NonFiniteError, match="parameters, the first of which is "):
        engine.train_step(micro_batches(BEFORE.stop, world), step=BEFORE.stop, learning_rate=1e-3)
    same = all(torch.equal(b, f.data) for b, f in zip(before, engine.fragments(), strict=True))
    for data, values in zip(weights, saved, strict=True):
        data.copy_(values)
    engine.restore(engine.counters())
    return same and engine.counters() == counters


def passes_change_nothing(engine: Engine, world: World, folder: Path) -> bool:
    """Return whether fragments keep their values until the update, during passes that run while a save copies them."""
    store = CheckpointStore(folder, keep=1, world=world)
    owned = engine.owned_fragments()
    before = [fragment.data.clone() for fragment in owned]
    same = []

    def compare() -> None:
        store.wait_for_copy()
        same.extend(torch.equal(values, fragment.data) for values, fragment in zip(before, owned, strict=True))

    store.begin(len(BEFORE), owned, {"counters": engine.counters()})
    step = len(BEFORE)
    engine.train_step(micro_batches(step, world), step=step, learning_rate=1e-3, before_update=compare)
    changed = [not torch.equal(values, fragment.data) for values, fragment in zip(before, owned, strict=True)]
    store.finish()
    return all(same) and any(changed)


def on_one_rank(world: World, folder: Path) -> dict[str, Any]:
    """Return for every engine its owned ranges, and its losses with and without a checkpoint in between."""
    results = {}
    for name, options in ENGINES.items():
        engine = build(FAMILY, world, **options)
        engine.rehearse(2)
        losses(engine, BEFORE, world)
        unchanged_during_save = passes_change_nothing(engine, world, folder / name)
        load(engine, folder / name)
        owned = [(f.name, f.shape, f.start, len(f.data)) for f in engine.owned_fragments()]
        unchanged_by_fault = non_finite_step_changes_nothing(engine, world)
        resumed = losses(engine, AFTER, world)
        resumed_from_alone = losses(load(build(FAMILY, world, **options), folder / "alone"), AFTER, world)
        scored = engine.nats(micro_batches(0)[0].rows.bytes.astype("int64")).tolist()
        results[name] = {
            "owned": owned,
            "unchanged_during_save": unchanged_during_save,
            "unchanged_by_fault": unchanged_by_fault,
            "resumed": resumed,
            "resumed_from_alone": resumed_from_alone,
            "scored": scored,
        }
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """Train one process, which saves a checkpoint in between, and return its losses."""
    engine = build(FAMILY)
    losses(engine, BEFORE)
    save(engine, folder / "alone", len(BEFORE))
    return losses(engine, AFTER)


@pytest.fixture(scope="module")
def results_by_rank(alone: list[float], folder: Path) -> list[dict[str, Any]]:
    return on_ranks(RANKS, on_one_rank, folder)


@pytest.mark.parametrize("name", ENGINES)
def test_owned_fragments_cover_every_element_once(results_by_rank: list[dict[str, Any]], name: str):
    ranges = defaultdict(list)
    for result in results_by_rank:
        for kind, shape, start, length in result[name]["owned"]:
            ranges[kind, tuple(shape)].append((start, start + length))
    whole = {(f.name, f.shape) for f in build(FAMILY).fragments()}
    assert set(ranges) == whole
    for (_, shape), parts in ranges.items():
        ends = [0, *(end for _, end in sorted(parts))]
        assert [start for start, _ in sorted(parts)] == ends[:-1]
        assert ends[-1] == math.prod(shape)


@pytest.mark.parametrize("name", ENGINES)
def test_passes_during_a_save_do_not_change_the_copied_values(results_by_rank: list[dict[str, Any]], name: str):
    assert all(result[name]["unchanged_during_save"] for result in results_by_rank)


def tolerance(name: str) -> float:
    return 2e-3 if "bf16" in name else 1e-5


@pytest.mark.parametrize("name", ENGINES)
def test_engine_resumes_from_the_checkpoint_of_one_process(
    results_by_rank: list[dict[str, Any]], alone: list[float], name: str
):
    for result in results_by_rank:
        assert result[name]["resumed_from_alone"] == pytest.approx(alone, rel=tolerance(name))


@pytest.mark.parametrize("name", ENGINES)
def test_one_process_resumes_from_the_checkpoint_of_an_engine(
    results_by_rank: list[dict[str, Any]], folder: Path, name: str
):
    engine = load(build(FAMILY, precision=ENGINES[name].get("precision", "fp32")), folder / name)
    assert losses(engine, AFTER) == pytest.approx(results_by_rank[0][name]["resumed"], rel=tolerance(name))


@pytest.mark.parametrize("name", ENGINES)
def test_non_finite_gradient_changes_nothing(results_by_rank: list[dict[str, Any]], alone: list[float], name: str):
    for result in results_by_rank:
        assert result[name]["unchanged_by_fault"]
        assert result[name]["resumed"] == pytest.approx(alone, rel=tolerance(name))


@pytest.mark.parametrize("name", ENGINES)
def test_all_ranks_compute_the_same_scores(results_by_rank: list[dict[str, Any]], name: str):
    assert results_by_rank[0][name]["scored"] == results_by_rank[1][name]["scored"]
