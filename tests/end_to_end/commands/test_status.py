"""`byteloom status`, `logs` and `cancel` of running and ended runs."""

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
from pretrain.cli.runs.status import status_remark
from pretrain.training.run_status import status_of
from tests import commands
from tests.conftest import Run, train_once


@pytest.fixture(scope="module")
def trained(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a run of twelve steps, which tests only read."""
    return train_once(tmp_path_factory.mktemp("trained"), corpus_folder)


def status(byteloom: Run, run: Path) -> dict[str, Any]:
    [found] = json.loads(byteloom("status", run, "--json").stdout)
    return found


def test_status_distinguishes_finished_runs_from_stopped_runs(byteloom: Run, trained: Path, tmp_path: Path):
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    shown = status(byteloom, trained)
    assert (shown["state"], shown["step"], shown["steps"], shown["checkpoint_step"]) == ("finished", 12, 12, 12)
    assert shown["bits_per_byte"] == last["train/bits_per_byte"]
    assert shown["validation_bits_per_byte"] == last["validation/bits_per_byte"]
    assert (shown["seconds_left"], shown["bytes_per_second"], shown["restarts"], shown["job"]) == (None, None, 0, None)

    runs = tmp_path / "runs"
    shutil.copytree(trained, runs / "whole")
    shutil.copytree(trained, runs / "part")
    lines = (trained / "metrics.jsonl").read_bytes()
    (runs / "part/metrics.jsonl").write_bytes(lines[:-10])  # an incomplete last line
    (runs / "part/generation").write_text("3\n")
    (runs / "mlflow.db").touch()
    shown = status(byteloom, runs / "part")
    assert (shown["state"], shown["step"], shown["starts"], shown["restarts"]) == ("stopped", 11, 3, 0)
    header, _, part, whole, remark = byteloom("status").stdout.splitlines()  # shows all runs in runs/
    assert header.split() == ["run", "state", "step", "bits/byte", "validation", "checkpoint"]
    assert part.split()[:3] == ["part", "stopped", "11/12"]
    assert whole.split()[:3] == ["whole", "finished", "12/12"]
    assert whole.split()[4] == f"{last['validation/bits_per_byte']:.4f}"
    assert remark == "part: 3 starts"
    assert "is not a run and not a folder of runs" in byteloom("status", tmp_path, check=False).stderr
    assert "whole is finished: there is nothing to cancel" in byteloom("cancel", runs / "whole", check=False).stderr


def test_status_counts_manual_starts_and_restarts_separately(trained: Path, tmp_path: Path):
    run = shutil.copytree(trained, tmp_path / "run")
    record = LaunchRecord(run)
    record.append("submitted", "1")
    for restart in range(3):
        record.append("started", "1", restart=restart)
        record.append("failed", "1", restart=restart, reason="rank 2 was killed by SIGKILL")
    (run / "generation").write_text("4\n")  # one more start, by `byteloom train`
    shown = status_of(run)
    assert (shown.starts, shown.restarts) == (2, 2)
    remark = "2 starts; 2 automatic restarts; failed: rank 2 was killed by SIGKILL"
    assert status_remark(replace(shown, job=None, reason="")) == remark


def test_background_process_is_shown_as_a_process_and_not_as_a_job(trained: Path, tmp_path: Path):
    run = shutil.copytree(trained, tmp_path / "run")
    submission = run / "jobs/0001"
    submission.mkdir(parents=True)
    (submission / "cluster.yaml").write_text("scheduler: local\n")
    LaunchRecord(run).append("started", str(os.getpid()), nodes=[platform.node()])
    shown = status_of(run)
    assert (shown.state, shown.job, shown.process) == ("running", None, os.getpid())
    assert status_remark(shown).startswith(f"process {os.getpid()} on {platform.node()}")


def test_status_shows_the_last_validation_of_any_age(trained: Path, tmp_path: Path):
    run = shutil.copytree(trained, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    without = {name: value for name, value in json.loads(lines[-2]).items() if not name.startswith("validation")}
    with (run / "metrics.jsonl").open("a") as journal:
        journal.writelines(json.dumps(without) + "\n" for _ in range(1000))
        journal.write('{"validation/bits_per_byte": 1')  # an incomplete line
    assert status_of(run).validation_bits_per_byte == json.loads(lines[-1])["validation/bits_per_byte"]
    (run / "metrics.jsonl").write_bytes(b"")
    assert status_of(run).validation_bits_per_byte is None


def test_running_run_is_followed_and_cancelled(byteloom: Run, recipe: Path):
    run = recipe.parent / "runs/run"
    training = commands.start(
        ["train", recipe, "train.steps=1000000", "checkpoint.every=100000", "validation.every=1000000"],
        cwd=recipe.parent, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_bytes()) < 5000:
        assert training.poll() is None
        time.sleep(0.05)
    following = commands.start(["logs", "--follow", run], stdout=subprocess.PIPE, text=True)
    shown = status(byteloom, run)
    assert (shown["state"], shown["process"], shown["steps"]) == ("running", training.pid, 1_000_000)
    assert shown["bytes_per_second"] > 0
    assert shown["seconds_left"] > 0

    assert f"SIGTERM was sent to process {training.pid}" in byteloom("cancel", run).stderr
    assert training.wait() == 128 + signal.SIGTERM
    logged, _ = following.communicate()  # the command ends because the run has ended
    assert following.returncode == 0
    assert logged == (run / "train.log").read_text() == byteloom("logs", run).stdout
    assert "SIGTERM: stopped after step" in logged
    shown = status(byteloom, run)
    assert shown["state"] == "stopped"
    assert shown["checkpoint_step"] == shown["step"] < 1_000_000
    assert "rank 7 has logged nothing yet" in byteloom("logs", run, "--rank", 7, check=False).stderr
