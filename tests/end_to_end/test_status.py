"""How runs fare, told while they run and afterwards; their logs; their end."""

import json
import os
import platform
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launchers.supervision.record import LaunchRecord
from pretrain.cli.runs import status_remark
from pretrain.training.run_status import status_of
from tests import commands
from tests.conftest import Run, train_once


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
    assert (told["state"], told["step"], told["starts"], told["restarts"]) == ("stopped", 11, 3, 0)
    header, _, part, whole, remark = byteloom("status").stdout.splitlines()  # of all runs in runs/
    assert header.split() == ["run", "state", "step", "bits/byte", "validation", "checkpoint"]
    assert part.split()[:3] == ["part", "stopped", "11/12"]
    assert whole.split()[:3] == ["whole", "finished", "12/12"]
    assert whole.split()[4] == f"{last['validation/bits_per_byte']:.4f}"
    assert remark == "part: 3 starts"
    assert "is not a run and not a folder of runs" in byteloom("status", tmp_path, check=False).stderr
    assert "whole is finished: there is nothing to cancel" in byteloom("cancel", runs / "whole", check=False).stderr


def test_starts_by_hand_are_told_from_restarts(trained: Path, tmp_path: Path):
    run = shutil.copytree(trained, tmp_path / "run")
    record = LaunchRecord(run)
    record.append("submitted", "1")
    for restart in range(3):
        record.append("started", "1", restart=restart)
        record.append("failed", "1", restart=restart, reason="rank 2 was killed by SIGKILL")
    (run / "generation").write_text("4\n")  # one more, by `byteloom train`
    told = status_of(run)
    assert (told.starts, told.restarts) == (2, 2)
    remark = "2 starts; 2 automatic restarts; failed: rank 2 was killed by SIGKILL"
    assert status_remark(replace(told, job=None, reason="")) == remark


def test_a_process_in_the_background_is_no_job(trained: Path, tmp_path: Path):
    run = shutil.copytree(trained, tmp_path / "run")
    submission = run / "jobs/0001"
    submission.mkdir(parents=True)
    (submission / "cluster.yaml").write_text("scheduler: local\n")
    LaunchRecord(run).append("started", str(os.getpid()), nodes=[platform.node()])
    told = status_of(run)
    assert (told.state, told.job, told.process) == ("running", None, os.getpid())
    assert status_remark(told).startswith(f"process {os.getpid()} on {platform.node()}")


def test_validation_is_shown_however_long_ago_it_was(trained: Path, tmp_path: Path):
    run = shutil.copytree(trained, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    without = {name: value for name, value in json.loads(lines[-2]).items() if not name.startswith("validation")}
    with (run / "metrics.jsonl").open("a") as journal:
        journal.writelines(json.dumps(without) + "\n" for _ in range(1000))
        journal.write('{"validation/bits_per_byte": 1')  # half a line
    assert status_of(run).validation_bits_per_byte == json.loads(lines[-1])["validation/bits_per_byte"]
    (run / "metrics.jsonl").write_bytes(b"")
    assert status_of(run).validation_bits_per_byte is None


def test_a_run_is_followed_and_cancelled(byteloom: Run, recipe: Path):
    run = recipe.parent / "runs/run"
    training = commands.start(
        ["train", recipe, "train.steps=1000000", "checkpoint.every=100000", "validation.every=1000000"],
        cwd=recipe.parent, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes()) < 5000:
        assert training.poll() is None
        time.sleep(0.05)
    following = commands.start(["logs", "--follow", run], stdout=subprocess.PIPE, text=True)
    told = status(byteloom, run)
    assert (told["state"], told["process"], told["steps"]) == ("running", training.pid, 1_000_000)
    assert told["bytes_per_second"] > 0
    assert told["seconds_left"] > 0

    assert f"SIGTERM was sent to process {training.pid}" in byteloom("cancel", run).stderr
    assert training.wait() == 128 + signal.SIGTERM
    said, _ = following.communicate()  # it ends because the run has
    assert following.returncode == 0
    assert said == (run / "train.log").read_text() == byteloom("logs", run).stdout
    assert "SIGTERM: stopped after step" in said
    told = status(byteloom, run)
    assert told["state"] == "stopped"
    assert told["checkpoint_step"] == told["step"] < 1_000_000
    assert "rank 7 has logged nothing yet" in byteloom("logs", run, "--rank", 7, check=False).stderr
