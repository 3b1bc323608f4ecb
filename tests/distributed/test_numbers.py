"""What ranks tell each other of a step."""

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
LATE = 1.0
"""Seconds by which rank 1 comes later than rank 0 to a step."""


def steps_on_rank(world: World, recipe: Path) -> dict[str, Any]:
    told: dict[str, Any] = {"numbers": world.gather_numbers(world.rank, 0.1, 2**53)}
    for name in ENGINES:
        engine = build("transformer", world, name=name)
        engine.train_step(micro_batches(0, world), step=0, learning_rate=0.0)
        dist.barrier()
        time.sleep(LATE * world.rank)
        begin = time.perf_counter()
        result = engine.train_step(micro_batches(1, world), step=1, learning_rate=0.0)
        told[name] = result, time.perf_counter() - begin
    logging.getLogger("pretrain").setLevel(logging.INFO)
    told["exit code"] = train(load(recipe), world)
    return told


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory, corpus_folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A run folder of two ranks, and what `steps_on_rank` tells on each."""
    folder = tmp_path_factory.mktemp("numbers")
    tree = recipe_tree(corpus_folder)
    tree["run"] = {"name": "run", "root": str(folder)}
    tree["optimizer"] = {"learning_rate": 3e-3, "schedule": {"warmup_steps": 1}}
    tree["train"] = {"steps": 2, "global_batch": 6, "micro_batch": 3}
    tree["profile"] = {"start": 2, "steps": 1}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return folder / "run", on_ranks(2, steps_on_rank, recipe)


def test_all_ranks_learn_what_each_says(of_ranks: tuple[Path, list[dict[str, Any]]]):
    for told in of_ranks[1]:
        assert told["numbers"] == [[0.0, 0.1, 2**53], [1.0, 0.1, 2**53]]


@pytest.mark.parametrize("engine", ENGINES)
def test_phases_of_all_ranks_are_parts_of_the_step(of_ranks: tuple[Path, list[dict[str, Any]]], engine: str):
    results: list[StepResult] = [told[engine][0] for told in of_ranks[1]]
    assert results[0] == results[1]
    ranks = results[0].ranks
    assert sum(rank.nats for rank in ranks) == pytest.approx(results[0].nats)
    for rank, (_, seconds) in zip(ranks, (told[engine] for told in of_ranks[1]), strict=True):
        phases = (rank.forward_backward, rank.optimizer, rank.communication)
        assert min(phases) > 0
        assert sum(phases) <= seconds


@pytest.mark.parametrize("engine", ENGINES)
def test_who_waits_for_a_late_rank_communicates(of_ranks: tuple[Path, list[dict[str, Any]]], engine: str):
    punctual, late = of_ranks[1][0][engine][0].ranks
    assert punctual.communication > late.communication + LATE / 2


def test_the_journal_has_the_largest_and_the_least_of_the_ranks(of_ranks: tuple[Path, list[dict[str, Any]]]):
    folder, told = of_ranks
    assert [each["exit code"] for each in told] == [0, 0]
    [*_, record] = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    for name in ("communication_seconds", "forward_backward_seconds", "peak_memory_bytes"):
        assert record[name] >= record[f"{name}/least"] > 0
    assert record["bytes_per_second"] == pytest.approx(2 * record["bytes_per_second/per_rank"])
    assert record["slowest_rank"] in (0, 1)
    assert record["step_seconds"] >= record["forward_backward_seconds"] + record["optimizer_seconds"]
    assert "peak memory by rank" in (folder / "train.log").read_text()


def test_every_rank_has_a_profile_of_its_own(of_ranks: tuple[Path, list[dict[str, Any]]]):
    written = sorted(str(path.relative_to(of_ranks[0])) for path in of_ranks[0].glob("profile/*/*.json"))
    assert written == [f"profile/rank-0000{rank}/step-00000002.json" for rank in (0, 1)]
