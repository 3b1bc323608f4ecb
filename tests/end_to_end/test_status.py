"""How runs fare, told while they run and afterwards; their logs; their end."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BYTELOOM, Run, environment, train_once


@pytest.fixture(scope="module")
def trained(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps, which these tests only read."""
    return train_once(tmp_path_factory.mktemp("trained"), corpus_folder)


def status(byteloom: Run, run: Path) -> dict[str, Any]:
    [told] = json.loads(byteloom("status", run, "--json").stdout)
    return told


def test_a_finished_run_is_told_from_one_that_stopped_or_died(byteloom: Run, trained: Path, tmp_path: Path):
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    told = status(byteloom, trained)
    assert (told["state"], told["step"], told["steps"], told["checkpoint_step"]) == ("finished", 12, 12, 12)
    assert told["bits_per_byte"] == last["train/bits_per_byte"]
    assert told["validation_bits_per_byte"] == last["validation/bits_per_byte"]
    assert (told["seconds_left"], told["bytes_per_second"], told["restarts"], told["job"]) == (None, None, 0, None)

    runs = tmp_path / "runs"
    shutil.copytree(trained, runs / "whole")
    shutil.copytree(trained, runs / "part")
    lines = (trained / "metrics.jsonl").read_bytes()
    (runs / "part/metrics.jsonl").write_bytes(lines[:-10])  # a line that was never written to its end
    (runs / "part/generation").write_text("3\n")
    (runs / "mlflow.db").touch()
    told = status(byteloom, runs / "part")
    assert (told["state"], told["step"], told["restarts"]) == ("stopped", 11, 2)
    table = [line.split() for line in byteloom("status").stdout.splitlines()]  # of all runs in runs/
    assert [row[:3] for row in table] == [
        ["run", "state", "step"],
        ["part", "stopped", "11/12"],
        ["whole", "finished", "12/12"],
    ]
    assert "is no run, and no folder of runs" in byteloom("status", tmp_path, check=False).stderr
    assert "whole is finished: there is nothing to cancel" in byteloom("cancel", runs / "whole", check=False).stderr


def test_a_run_is_followed_and_cancelled(byteloom: Run, recipe: Path):
    run = recipe.parent / "runs/run"
    training = subprocess.Popen(
        [BYTELOOM, "train", recipe, "train.steps=1000000", "checkpoint.every=100000", "validation.every=1000000"],
        cwd=recipe.parent, env=environment(), stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes()) < 5000:
        assert training.poll() is None
        time.sleep(0.05)
    following = subprocess.Popen([BYTELOOM, "logs", "--follow", run], stdout=subprocess.PIPE, text=True)
    told = status(byteloom, run)
    assert (told["state"], told["process"], told["steps"]) == ("running", training.pid, 1_000_000)
    assert told["bytes_per_second"] > 0
    assert told["seconds_left"] > 0

    assert f"was asked to stop: process {training.pid}" in byteloom("cancel", run).stderr
    assert training.wait() == 128 + signal.SIGTERM
    said, _ = following.communicate()  # it ends because the run has
    assert following.returncode == 0
    assert said == (run / "train.log").read_text() == byteloom("logs", run).stdout
    assert "SIGTERM: stopped after step" in said
    told = status(byteloom, run)
    assert told["state"] == "stopped"
    assert told["checkpoint_step"] == told["step"] < 1_000_000
    assert "rank 7 has said nothing yet" in byteloom("logs", run, "--rank", 7, check=False).stderr
