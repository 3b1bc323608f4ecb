"""Numbers of a step that ranks exchange."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from pretrain.config.loading import load
from pretrain.distributed.world import World
from pretrain.engines import StepResult
from pretrain.training.loop import train
from tests.conftest import recipe_tree
from tests.distributed.parity import build, micro_batches
from tests.distributed.ranks import on_ranks

ENGINES = ("ddp", "fsdp")
DELAY = 1.0
"""Seconds by which rank 1 starts a step later than rank 0."""


def steps_on_rank(world: World, recipe: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"numbers": world.gather_numbers(world.rank, 0.1, 2**53)}
    for name in ENGINES:
        engine = build("transformer", world, name=name)
        engine.train_step(micro_batches(0, world), step=0, learning_rate=0.0)
        dist.barrier()
        time.sleep(DELAY * world.rank)
        begin = time.perf_counter()
        result = engine.train_step(micro_batches(1, world), step=1, learning_rate=0.0)
        results[name] = result, time.perf_counter() - begin
    logging.getLogger("pretrain").setLevel(logging.INFO)
    results["exit code"] = train(load(recipe), world)
    return results


@pytest.fixture(scope="module")
def results_by_rank(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Run folder of two ranks, and the result of `steps_on_rank` on each."""
    folder = tmp_path_factory.mktemp("numbers")
    tree = recipe_tree(corpus_folder)
    tree["run"] = {"name": "run", "root": str(folder)}
    tree["optimizer"] = {"learning_rate": 3e-3, "schedule": {"warmup_steps": 1}}
    tree["train"] = {"steps": 2, "global_batch": 6, "micro_batch": 3}
    tree["profile"] = {"start": 2, "steps": 1}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return folder / "run", on_ranks(2, steps_on_rank, recipe)


def test_gather_numbers_returns_the_numbers_of_every_rank(results_by_rank: tuple[Path, list[dict[str, Any]]]):
    for result in results_by_rank[1]:
        assert result["numbers"] == [[0.0, 0.1, 2**53], [1.0, 0.1, 2**53]]


@pytest.mark.parametrize("engine", ENGINES)
def test_phases_of_every_rank_fit_in_the_step(results_by_rank: tuple[Path, list[dict[str, Any]]], engine: str):
    results: list[StepResult] = [result[engine][0] for result in results_by_rank[1]]
    assert results[0] == results[1]
    ranks = results[0].ranks
    assert sum(rank.nats for rank in ranks) == pytest.approx(results[0].nats)
    for rank, (_, seconds) in zip(ranks, (result[engine] for result in results_by_rank[1]), strict=True):
        phases = (rank.forward_backward, rank.optimizer, rank.communication)
        assert min(phases) > 0
        assert sum(phases) <= seconds


@pytest.mark.parametrize("engine", ENGINES)
def test_waiting_for_a_delayed_rank_counts_as_communication(
    results_by_rank: tuple[Path, list[dict[str, Any]]], engine: str
):
    punctual, delayed = results_by_rank[1][0][engine][0].ranks
    assert punctual.communication > delayed.communication + DELAY / 2


def test_journal_has_the_largest_and_smallest_value_of_the_ranks(results_by_rank: tuple[Path, list[dict[str, Any]]]):
    folder, result = results_by_rank
    assert [each["exit code"] for each in result] == [0, 0]
    [*_, record] = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    for name in ("communication_seconds", "forward_backward_seconds", "peak_memory_bytes"):
        assert record[name] >= record[f"{name}/least"] > 0
    assert record["bytes_per_second"] == pytest.approx(2 * record["bytes_per_second/per_rank"])
    assert record["slowest_rank"] in (0, 1)
    assert record["step_seconds"] >= record["forward_backward_seconds/least"]  # the step's time is that of rank 0
    assert "peak memory by rank" in (folder / "train.log").read_text()


def test_every_rank_writes_its_own_profile(results_by_rank: tuple[Path, list[dict[str, Any]]]):
    written = sorted(str(path.relative_to(results_by_rank[0])) for path in results_by_rank[0].glob("profile/*/*.json"))
    assert written == [f"profile/rank-0000{rank}/step-00000002.json" for rank in (0, 1)]
