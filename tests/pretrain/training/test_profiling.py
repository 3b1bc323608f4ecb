"""Profiler: it records exactly the steps of its window, and changes no loss."""

import json
import logging
from pathlib import Path

import pytest
import yaml

from pretrain.config.loading import load
from pretrain.training.loop import train
from tests.conftest import recipe_tree

WINDOW = ("profile.start=3", "profile.steps=3", "profile.memory=true")


@pytest.fixture
def folder(tmp_path: Path, corpus_folder: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """Return a folder with a recipe whose learning rate does not depend on the length of the run."""
    caplog.set_level(logging.INFO, "pretrain")
    tree = recipe_tree(corpus_folder)
    tree["run"] = {"name": "plain", "root": str(tmp_path)}
    tree["optimizer"] = {"schedule": {"shape": "constant", "warmup_steps": 1}}
    tree["checkpoint"] = {"every": 100}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def losses_of(folder: Path, *overrides: str) -> list[float]:
    config = load(folder / "recipe.yaml", [*overrides, "validation.shards=null"])
    assert train(config) == 0
    lines = (folder / config.run.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/bits_per_byte"] for line in lines]


@pytest.mark.slow
def test_window_is_profiled_across_a_resume_and_changes_no_loss(folder: Path):
    losses_of(folder, "run.name=profiled", "train.steps=4", *WINDOW)
    profiled = losses_of(folder, "run.name=profiled", "train.steps=7", *WINDOW)
    assert profiled == losses_of(folder, "train.steps=7")
    assert not (folder / "plain/profile").exists()
    found = folder / "profiled/profile/rank-00000"
    assert {path.name for path in found.iterdir()} == {
        f"step-0000000{step}.{kind}" for step in (3, 4, 5) for kind in ("json", "txt")
    }
    for step in (3, 4, 5):
        names = {event["name"] for event in json.loads((found / f"step-0000000{step}.json").read_text())["traceEvents"]}
        assert {"aten::_fused_adamw_", "[memory]"} <= names
        assert {"wait for data", "forward", "backward", "update", "checkpoint: wait for the copy"} <= names
        assert {"global_stack.blocks.0", "global_stack.blocks.1", "local_stack.blocks.0"} <= names
        assert "aten::mm" in (found / f"step-0000000{step}.txt").read_text()
    log = (folder / "profiled/train.log").read_text()
    assert "the profiler will record steps 3 to 4" in log
    assert "the profiler will record steps 5 to 5" in log


@pytest.mark.slow
def test_past_window_is_logged(folder: Path):
    losses_of(folder, "train.steps=2", "profile.start=3")
    assert "steps 3 to 5 are past, so the profiler does not record them" in (folder / "plain/train.log").read_text()
    assert not (folder / "plain/profile").exists()
