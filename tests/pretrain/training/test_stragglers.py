"""Slow ranks: found by their compute times, and no false alarm on a noisy machine."""

import json
import platform
import random
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from launchers.supervision.slow_ranks import SlowRank, describe_slow_ranks, read_slow_ranks, write_slow_ranks
from pretrain.cli.runs.status import status_remark
from pretrain.config.loading import load
from pretrain.distributed.world import World
from pretrain.training.callbacks import Callback, register_callback
from pretrain.training.callbacks.stragglers import StragglerWatch, Window, equal_work
from pretrain.training.loop import train
from pretrain.training.run import TrainingRun
from pretrain.training.run_status import status_of
from tests.conftest import recipe_tree
from tests.distributed.ranks import on_ranks

STEPS = 50


def window_of(factors: list[float], seed: int, noise: float = 0.0, second: float = 1.0) -> Window:
    """Return what a window shows of ranks with these factors of compute time.

    Each time is multiplied by a random factor of its own. Each step is multiplied by a factor that all ranks share. One
    time in ten is a pause ten times as long.
    """
    draw = random.Random(seed)
    watch = StragglerWatch([range(len(factors))], 1.25, STEPS)
    for step in range(STEPS):
        shared = second * draw.uniform(0.5, 2)
        times = [
            shared * factor * draw.uniform(1 - noise, 1 + noise) * (10 if draw.random() < 0.1 else 1)
            for factor in factors
        ]
        found = watch.add(times)
        assert (found is not None) == (step == STEPS - 1)
    assert found is not None
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 64), st.data())
def test_slow_rank_is_found_among_noisy_ones_with_its_factor(size: int, data: st.DataObject):
    slow = data.draw(st.integers(0, size - 1))
    factors = [1.4 if rank == slow else 1.0 for rank in range(size)]
    found = window_of(factors, data.draw(st.integers()), noise=0.05)
    assert found.slow == [slow]
    assert found.factors[slow] == pytest.approx(1.4, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 64), st.integers())
def test_noise_pauses_and_uneven_steps_raise_no_alarm(size: int, seed: int):
    assert window_of([1.0] * size, seed, noise=0.3).slow == []


def test_node_whose_ranks_are_all_slow_is_found_and_milliseconds_are_not():
    assert window_of([1.0, 1.0, 1.5, 1.5], 0).slow == [2, 3]
    assert window_of([1.0, 1.5], 0).slow == [1]
    assert window_of([1.0, 1.5], 0, second=0.002).slow == []  # it loses about a millisecond a step


def test_rank_that_is_slow_in_half_of_the_steps_is_not_reported():
    watch = StragglerWatch([range(3)], 1.25, STEPS)
    for step in range(STEPS):
        found = watch.add([1.0, 1.0, 2.0 if step % 2 else 1.0])
    assert found is not None and found.slow == []


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "size", "groups"),
    [
        (16, 2, 4, [[0, 1, 2, 3]]),
        (10, 2, 4, [[1, 2, 3]]),  # rank 0 has two micro-batches, and no other rank has
        (12, 2, 4, [[0, 1], [2, 3]]),
        (7, 2, 4, [[0, 1, 2]]),  # the last micro-batch has one row
        (4, 2, 4, [[0, 1], [2, 3]]),
        (6, 6, 1, []),
    ],
)
def test_ranks_are_compared_with_those_that_have_as_much_work(
    global_batch: int, micro_batch: int, size: int, groups: list[list[int]]
):
    assert equal_work(global_batch, micro_batch, size) == groups


def test_ranks_of_a_context_group_are_compared_with_those_that_have_the_same_part():
    assert equal_work(8, 2, 8, context=2) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_slow_ranks_are_described_by_node():
    assert describe_slow_ranks([SlowRank(37, "n12", 1.3)]) == {"n12": "rank 37 on n12 is 30 % slower than the median"}
    both = [SlowRank(8, "n2", 1.25), SlowRank(1, "n1", 1.5), SlowRank(9, "n2", 1.31)]
    assert describe_slow_ranks(both) == {
        "n2": "ranks 8, 9 on n2 are up to 31 % slower than the median",
        "n1": "rank 1 on n1 is 50 % slower than the median",
    }


def test_file_of_slow_ranks_is_removed_and_damage_or_a_full_disk_is_no_fault(tmp_path: Path):
    write_slow_ranks(tmp_path, 50, [SlowRank(1, "n1", 1.5)])
    assert read_slow_ranks(tmp_path) == [SlowRank(1, "n1", 1.5)]
    (tmp_path / "slow-ranks.json").write_text('{"step"')
    assert read_slow_ranks(tmp_path) == []
    write_slow_ranks(tmp_path, 100, [])
    write_slow_ranks(tmp_path, 150, [])
    assert list(tmp_path.iterdir()) == []
    write_slow_ranks(tmp_path / "gone", 1, [SlowRank(1, "n1", 1.5)])


class DragConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Slow forward passes of rank 1."""


class Drag(Callback):
    """Callback that makes rank 1 slow, and reads the status of the run after its last step."""

    remarks: list[str]

    def __init__(self, config: DragConfig) -> None:
        type(self).remarks = []

    def on_start(self, run: TrainingRun) -> None:
        if run.world.rank == 1:
            run.model.register_forward_pre_hook(lambda *_: time.sleep(0.1))

    def on_numbers(self, run: TrainingRun, numbers: Mapping[str, float]) -> None:
        if run.world.is_first and run.is_done:
            self.remarks.append(status_remark(status_of(run.folder.path)))


def train_with_a_slow_rank(world: World, recipe: Path) -> tuple[int, list[str]]:
    register_callback("drag", DragConfig)(Drag)
    return train(load(recipe, ["callbacks.drag={}", "supervise.slow_steps=10"]), world), Drag.remarks


@pytest.mark.slow
def test_slow_rank_is_in_the_metrics_the_log_the_run_folder_and_the_status(tmp_path: Path, corpus_folder: Path):
    tree = recipe_tree(corpus_folder)
    tree["run"] = {"name": "slow", "root": str(tmp_path)}
    tree["validation"] = {}
    tree["train"] = {"steps": 10, "global_batch": 4, "micro_batch": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    run = tmp_path / "slow"
    run.mkdir()
    write_slow_ranks(run, 5, [SlowRank(0, "n1", 9.0)])  # of an earlier start
    (code, remarks), _ = on_ranks(2, train_with_a_slow_rank, tmp_path / "recipe.yaml")
    assert code == 0
    (slow,) = read_slow_ranks(run)
    assert (slow.rank, slow.node) == (1, platform.node()) and slow.factor > 1.25
    (clause,) = describe_slow_ranks([slow]).values()
    assert clause in remarks[0].split("; ")
    assert f"{clause} (its compute time, in the last 10 steps)" in (run / "train.log").read_text()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["stragglers/rank"] == 1 and last["stragglers/slow_ranks"] == 1
    assert last["stragglers/factor"] == slow.factor
