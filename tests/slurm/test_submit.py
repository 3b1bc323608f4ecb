"""`byteloom submit` against a real Slurm: four ranks on two nodes, and what ends them."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.slurm.presets import ClusterConfig, ClusterError
from launchers.submission import Submission
from launchers.supervision.plan import LaunchPlan, SuperviseConfig
from launchers.supervision.record import Launch, LaunchRecord
from tests.end_to_end.test_tracking import delivered, journal
from tests.slurm.cluster import Cluster, running_cluster, wait_until
from tests.slurm.submitted import SAME, SubmittedRun, assert_trained_as, byteloom, write_recipe

TWO_BY_TWO = ("--nodes=2", "--processes-per-node=2", "--cpus-per-process=1", "--partition=low", "--time=120")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One that gives those it preempts as long as a loaded machine may need."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), grace=120) as cluster:
        yield cluster


def test_preempted_and_killed_it_goes_on_as_if_nothing_had_been(cluster: Cluster, corpus_folder: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path, corpus_folder)
    run = SubmittedRun(cluster, recipe, "faulty", "tracking.enabled=true", *TWO_BY_TWO)
    run.wait_for_step(8)
    cluster.run("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    stopped = run.wait_for("stopped")
    assert stopped.reason.endswith(": preempted")
    assert run.wait_for("requeued").reason == stopped.reason
    run.wait_for("started", 2)
    assert stopped.step == run.last_step() >= 8

    run.wait_for_step(stopped.step + 8)
    [victim] = cluster.processes(run.job, rank=3)
    assert f"PYTHONPATH={run.folder}/jobs/001/code" in Path(f"/proc/{victim}/environ").read_text()
    os.kill(victim, signal.SIGKILL)
    failed = run.wait_for("failed")
    assert failed.reason == f"rank 3 on {failed.nodes[1]}: Killed"
    run.wait_for("finished")
    assert run.events() == [
        "submitted", "started", "stopped", "requeued", "started", "failed", "started", "finished",
    ]  # fmt: skip

    byteloom(cluster, tmp_path, "train", recipe, "run.name=reference", "engine.name=ddp")
    assert_trained_as(run.folder, tmp_path / "runs/reference", relative=1e-4)
    mlflow_run, metrics = delivered(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert mlflow_run.info.status == "FINISHED"
    # Steps that were computed again after the kill took another time, which MLflow is not told.
    again = journal(run.folder)
    assert _steps(metrics) == _steps(again)
    assert [metrics[name] for name in SAME] == [again[name] for name in SAME]


def _steps(metrics: dict[str, list[tuple[int, float]]]) -> dict[str, list[int]]:
    return {name: [step for step, _ in pairs] for name, pairs in metrics.items()}


class Light:
    """A submitted run of ranks without a model; see tests/launchers/entry.py."""

    def __init__(self, cluster: Cluster, run: Path, starts: Sequence[dict[str, Any]], **asked: Any) -> None:
        self.run = run
        preset = ClusterConfig(partition="low", time="60", **asked)
        plan = LaunchPlan(
            entry="tests.launchers.entry:start",
            run=str(run),
            checkpoints=str(run / "checkpoints"),
            processes_per_node=preset.ranks_per_node,
            cpus_per_process=1,
            gpus_per_node=preset.gpus_per_node,
            supervise=SuperviseConfig(step_seconds=30),
        )
        recipe = yaml.safe_dump({"run": str(run), "starts": list(starts)})
        self.job = Submission(run, recipe, plan, preset).submit()
        self.cluster = cluster

    def wait_for(self, event: str, count: int = 1) -> list[Launch]:
        """The whole record, once it has so many events of a kind."""
        record = LaunchRecord(self.run)
        wait_until(
            lambda: sum(launch.event == event for launch in record.read()) >= count, f"{event} in {self.run}", 120
        )
        return record.read()


@pytest.fixture
def light(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> type[Light]:
    """With which this very process submits."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
    return Light


def test_a_node_where_failures_begin_again_and_again_is_excluded(cluster: Cluster, light: type[Light], tmp_path: Path):
    starts = [
        {"rank": 1, "does": "die", "checkpoint": 1},
        {"rank": 1, "does": "die", "checkpoint": 2},
        {"does": "finish"},
    ]
    run = light(cluster, tmp_path / "run", starts, nodes="2")
    launches = run.wait_for("finished")
    assert [launch.event for launch in launches if launch.event != "submitted"] == [
        "started", "failed", "started", "failed", "excluded", "requeued", "started", "finished",
    ]  # fmt: skip
    faulty = launches[-3].reason.removeprefix("without ")
    assert faulty == cluster.job(run.job)["ExcNodeList"] == launches[1].nodes[1]
    assert faulty not in launches[-1].nodes


def test_an_elastic_job_takes_the_nodes_there_are_at_each_start(cluster: Cluster, light: type[Light], tmp_path: Path):
    busy = cluster.run("sbatch", "--parsable", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
    cluster.wait_for(busy, "RUNNING")
    run = light(cluster, tmp_path / "run", [{"does": "wait"}, {"does": "finish"}], nodes="2-4", gpus_per_node=2)
    run.wait_for("started")
    wait_until(lambda: len(list((tmp_path / "run").rglob("rank-*.json"))) == 4, "a rank for each GPU", 60)
    cluster.run("scancel", busy)
    cluster.run("scancel", "--signal=USR2", run.job)
    launches = run.wait_for("finished")
    assert [len(launch.nodes) for launch in launches if launch.event == "started"] == [2, 4]
    [stopped] = [launch for launch in launches if launch.event == "stopped"]
    assert stopped.reason == "SIGUSR2: asked by hand"
    outputs = sorted((tmp_path / "run/jobs/001/ranks").iterdir())
    assert len(outputs) == 8
    told = [{line for line in path.read_text().splitlines() if line.startswith("GPUs")} for path in outputs]
    assert told == [{"GPUs 0,1"}] * 8


def test_nodes_that_cannot_train_are_named_in_a_line(cluster: Cluster, light: type[Light], tmp_path: Path):
    """Those that do not share the run folder, and those without Slurm's commands."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for folder in (cluster.local, cluster.folder / "nodes/n1"):
        (folder / "runs").symlink_to(shared)
    blind = light(cluster, cluster.local / "runs/run", [], nodes="2", sbatch={"nodelist": "n[1-2]"})
    said = blind.wait_for("gave_up")[-1].reason
    assert said.startswith(f"n2 cannot see {cluster.local}/runs/run/jobs/001, or ")

    blind = light(cluster, cluster.local / "runs/other", [], nodes="1", sbatch={"nodelist": "n2"})
    cluster.wait_for(blind.job, "FAILED")
    comment = f"Comment=n2 cannot see {cluster.local}/runs/other/jobs/001: put run.root on a file system"
    assert comment in cluster.run("scontrol", "show", "job", blind.job)

    poor = light(cluster, tmp_path / "poor", [], nodes="1", setup=["PATH=/nowhere"])
    assert " has no scontrol in PATH, which the supervisor needs" in poor.wait_for("gave_up")[-1].reason
    cluster.wait_for(poor.job, "FAILED")


def test_what_cannot_be_submitted_is_refused_in_a_line(
    cluster: Cluster, light: type[Light], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    refused = "Slurm refuses the job: .*"
    with pytest.raises(ClusterError, match=f"{refused}Requested node configuration is not available"):
        light(cluster, tmp_path / "run", [], cpus_per_process=999)
    with pytest.raises(ClusterError, match=f"{refused}Requested node configuration is not available"):
        light(cluster, tmp_path / "run", [], nodes="99")
    assert not (tmp_path / "run").exists()

    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        with pytest.raises(ClusterError, match=f"cannot write to the run folder {small}/run: .*No space left"):
            light(cluster, small / "run", [])
    finally:
        subprocess.run(["umount", small], check=True)

    said = byteloom(
        cluster, tmp_path, "submit", write_recipe(tmp_path, tmp_path), "--cluster=cpu", "--partition=none", check=False
    )
    assert said.returncode == 1
    assert said.stderr.startswith("error: Slurm refuses the job: invalid partition specified: none; ")
    assert len(said.stderr.splitlines()) == 1

    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        ClusterError, match="this machine has no sbatch: Slurm is not installed, or its environment module"
    ):
        light(cluster, tmp_path / "run", [])
