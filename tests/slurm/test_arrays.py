"""Job arrays on a real cluster: preparation of a corpus by tasks that are killed, and sweeps."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.preparation.prepare import prepare
from launchers.slurm import scheduler
from launchers.slurm.scheduler import JobPhase
from pretrain.training.run_status import status_of
from tests.commands import BYTELOOM
from tests.conftest import STDLIB, prepare_options
from tests.mlflow_server import client_of
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.submitted import PATIENCE, STEPS, byteloom, write_recipe

SOURCES = [STDLIB / name for name in ("asyncio", "email", "idlelib")]


@pytest.fixture(autouse=True)
def _use_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])


def test_preparation_array_with_killed_tasks_writes_the_manifest_of_one_process(cluster: Cluster, tmp_path: Path):
    options = {"include": ["*.py"], "holdout": 0.1, "shard_bytes": 100_000, "block_bytes": 20_000, "level": 19}
    prepare(SOURCES, tmp_path / "alone", prepare_options(**options), lambda done, total: None)
    out = tmp_path / "out"
    words = ["--include=*.py", "--holdout=0.1", "--shard-bytes=100000", "--block-bytes=20000", "--level=19"]
    printed = cluster.run(BYTELOOM, "prepare", *SOURCES, f"--out={out}", *words, "--slurm", "--tasks=6", "--parallel=2")
    array, merge = printed.split()
    killed, most_running = set[str](), 0
    while scheduler.job(merge).phase.is_alive:
        time.sleep(0.1)
        running = [job.id for job in scheduler.jobs(array) if job.phase is JobPhase.RUNNING]
        most_running = max(most_running, len(running))
        if len(killed) < 2 and list(tmp_path.glob("out.partial/shards/*.json")):
            for task in [task for task in running if task not in killed][: 2 - len(killed)]:
                for process in cluster.processes(task)[:1]:
                    os.kill(process, signal.SIGKILL)
                    killed.add(task)
    assert scheduler.job(merge).phase is JobPhase.FINISHED
    assert len(killed) == most_running == 2
    assert {job.id for job in scheduler.jobs(array) if job.restarts} == killed
    assert {job.phase for job in scheduler.jobs(array)} == {JobPhase.FINISHED}
    for part in ("train", "validation"):
        with Corpus(out / part) as corpus, Corpus(tmp_path / "alone" / part) as expected:
            assert corpus.manifest == expected.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out", "out.jobs"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_sweep_is_an_array_of_runs_that_are_shown_together(cluster: Cluster, corpus_folder: Path, tmp_path: Path):
    """One run is requeued; `status` reports the requeue, and never that the run has ended."""
    recipe = write_recipe(tmp_path, corpus_folder)
    grid = ("train.seed=0,1", "engine.name=ddp", "validation.every=60", "checkpoint.every=60", "tracking.enabled=true")
    options = ("--cluster=cpu", "--processes-per-node=1", "--partition=low", "--parallel=2")
    jobs = byteloom(cluster, tmp_path, "sweep", recipe, *grid, *options).stdout.split()
    array = jobs[0].partition("_")[0]
    assert jobs == [f"{array}_0", f"{array}_1"]
    runs = [tmp_path / f"runs/run-seed-{seed}" for seed in (0, 1)]

    wait_until(lambda: status_of(runs[0]).step >= 8, "the first run trains", PATIENCE)
    status = status_of(runs[0])
    assert (status.state, status.steps, status.job) == ("running", STEPS, jobs[0])
    assert status.seconds_left is not None
    scheduler.requeue(jobs[0])
    states = list[str]()
    wait_until(
        lambda: states.append(status_of(runs[0]).state) or states[-1] == "finished",
        "the first run has finished",
        PATIENCE,
    )
    assert set(states) <= {"running", "ending", "requeued", "finished"}
    assert "requeued" in states
    status = status_of(runs[0])
    assert (status.step, status.restarts, status.checkpoint_step) == (STEPS, 1, STEPS)
    assert status.why.startswith("stopped: ")
    wait_until(lambda: status_of(runs[1]).state == "finished", "the second run has finished", PATIENCE)
    assert status_of(runs[1]).restarts == 0
    assert str(runs[1].name) in byteloom(cluster, tmp_path, "status").stdout

    client = client_of(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("byteloom")
    known = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = known.pop("run")
    assert parent.data.tags["sweep"] == " ".join(grid)
    assert {name: run.data.params["train.seed"] for name, run in known.items()} == {
        "run-seed-0": "0",
        "run-seed-1": "1",
    }
    assert {run.data.tags["mlflow.parentRunId"] for run in known.values()} == {parent.info.run_id}
    assert {run.info.status for run in (parent, *known.values())} == {"FINISHED"}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_comparison_is_an_array_whose_results_are_shown_when_it_has_ended(
    cluster: Cluster, corpus_folder: Path, tmp_path: Path
):
    """The time of a step is measured by a first array; a call after the end of the runs submits nothing."""
    recipe = write_recipe(tmp_path, corpus_folder)
    words = ("compare", recipe, "validation.every=1000", "--seconds=4", "--seeds=0,1", "--name=timed")
    options = ("--cluster=cpu", "--processes-per-node=1", "--partition=low")
    first = byteloom(cluster, tmp_path, *words, *options)
    [trial] = first.stdout.split()
    assert "repeat the command when they have ended" in first.stderr
    wait_until(lambda: not scheduler.job(trial).phase.is_alive, "the trial has ended", PATIENCE)
    assert "2 jobs submitted" in byteloom(cluster, tmp_path, *words, *options).stderr
    runs = [tmp_path / f"runs/timed-recipe-seed-{seed}" for seed in (0, 1)]
    for run in runs:
        wait_until(lambda run=run: status_of(run).state == "finished", f"{run} has finished", PATIENCE)
    again = byteloom(cluster, tmp_path, *words, *options, "--json")
    assert "submitted" not in again.stderr
    [found] = json.loads(again.stdout)["recipes"]
    assert [each["state"] for each in found["runs"]] == ["finished", "finished"]
    assert found["steps"] == max(1, round(4 / found["step_seconds"]))
