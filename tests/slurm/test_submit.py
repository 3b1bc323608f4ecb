"""`byteloom submit` with a real Slurm: ranks on two nodes, and events that end them; test_faults.py has more."""

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
from launchers.supervision.plan import SuperviseConfig
from launchers.supervision.record import Launch, LaunchRecord
from tests.end_to_end.runs.test_tracking import delivered, journal
from tests.launchers.plans import modelless_plan
from tests.slurm.cluster import Cluster, running_cluster, wait_until
from tests.slurm.submitted import COMPARED_METRICS, SubmittedRun, assert_trained_as, byteloom, write_recipe

NEVER_HANGS = SuperviseConfig(step_seconds=30)
NO_DEVICES = ["gpus", "product", "all-reduce"]
"""Checks that fail where GPUs are stand-ins."""
TWO_NODES = ("--nodes=2", "--processes-per-node=1", "--cpus-per-process=1", "--partition=low", "--time=120")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a cluster that gives preempted jobs as much time as a loaded machine may need."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), grace=120) as cluster:
        yield cluster


@pytest.mark.timeout(900)
def test_preempted_and_killed_run_resumes_as_if_nothing_had_happened(
    cluster: Cluster, corpus_folder: Path, tmp_path: Path
):
    recipe = write_recipe(tmp_path, corpus_folder)
    run = SubmittedRun(cluster, recipe, "faulty", "tracking.enabled=true", *TWO_NODES)
    run.wait_for_step(8)
    cluster.run("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    stopped = run.wait_for("stopped")
    assert stopped.reason.endswith(": preempted")
    assert run.wait_for("requeued").reason == stopped.reason
    run.wait_for("started", 2)
    assert stopped.step is not None and stopped.step >= 8
    # A stop in a validation leaves the numbers of its step to the next start.
    assert run.last_step() in (stopped.step - 1, stopped.step)

    run.wait_for_step(stopped.step + 8)
    [victim] = cluster.processes(run.job, rank=1)
    assert f"PYTHONPATH={run.folder}/jobs/001/code" in Path(f"/proc/{victim}/environ").read_text()
    os.kill(victim, signal.SIGKILL)
    failed = run.wait_for("failed")
    assert failed.reason == f"rank 1 on {failed.nodes[1]}: Killed"
    run.wait_for("finished")
    assert run.events() == [
        "submitted", "started", "stopped", "requeued", "started", "failed", "started", "finished",
    ]  # fmt: skip

    byteloom(cluster, tmp_path, "train", recipe, "run.name=reference", "engine.name=ddp")
    assert_trained_as(run.folder, tmp_path / "runs/reference", relative=1e-4)
    mlflow_run, metrics = delivered(f"sqlite:///{tmp_path}/runs/mlflow.db")
    assert mlflow_run.info.status == "FINISHED"
    # The times of steps repeated after the kill differ, and MLflow keeps the first ones.
    recorded = journal(run.folder)
    assert _steps(metrics) == _steps(recorded)
    assert [metrics[name] for name in COMPARED_METRICS] == [recorded[name] for name in COMPARED_METRICS]


def _steps(metrics: dict[str, list[tuple[int, float]]]) -> dict[str, list[int]]:
    return {name: [step for step, _ in pairs] for name, pairs in metrics.items()}


class ModellessRun:
    """Submitted run of ranks without a model; see tests/launchers/entry.py."""

    def __init__(
        self,
        cluster: Cluster,
        run: Path,
        starts: Sequence[dict[str, Any]],
        limits: SuperviseConfig = NEVER_HANGS,
        **resources: Any,
    ) -> None:
        self.run = run
        preset = ClusterConfig(partition="low", time="60", **resources)
        recipe = yaml.safe_dump({"run": str(run), "starts": list(starts)})
        self.job = Submission(run, recipe, modelless_plan(run, preset, limits), preset).submit()
        self.cluster = cluster

    def wait_for(self, event: str, count: int = 1) -> list[Launch]:
        """Wait until the record has a number of events of a kind, and return the whole record."""
        record = LaunchRecord(self.run)
        wait_until(
            lambda: sum(launch.event == event for launch in record.read()) >= count, f"{event} in {self.run}", 120
        )
        return record.read()


@pytest.fixture
def modelless_run(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> type[ModellessRun]:
    """Return the class of runs that this process submits."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
    return ModellessRun


def test_node_where_failures_start_repeatedly_is_excluded(
    cluster: Cluster, modelless_run: type[ModellessRun], tmp_path: Path
):
    starts = [
        {"rank": 1, "does": "die", "checkpoint": 1},
        {"rank": 1, "does": "die", "checkpoint": 2},
        {"does": "finish"},
    ]
    run = modelless_run(cluster, tmp_path / "run", starts, nodes="2")
    launches = run.wait_for("finished")
    assert [launch.event for launch in launches if launch.event != "submitted"] == [
        "started", "failed", "started", "failed", "excluded", "requeued", "started", "finished",
    ]  # fmt: skip
    faulty = launches[-3].reason.removeprefix("without ")
    assert faulty == cluster.job(run.job)["ExcNodeList"] == launches[1].nodes[1]
    assert faulty not in launches[-1].nodes


def test_elastic_job_uses_the_free_nodes_at_each_start(
    cluster: Cluster, modelless_run: type[ModellessRun], tmp_path: Path
):
    busy = cluster.run("sbatch", "--parsable", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 600")
    cluster.wait_for(busy, "RUNNING")
    run = modelless_run(
        cluster,
        tmp_path / "run",
        [{"does": "wait"}, {"does": "finish"}],
        nodes="2-4",
        gpus_per_node="2",
        unchecked=NO_DEVICES,
    )
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
    printed = [{line for line in path.read_text().splitlines() if line.startswith("GPUs")} for path in outputs]
    assert printed == [{"GPUs 0,1"}] * 8


def test_nodes_that_cannot_train_are_named_in_one_line(
    cluster: Cluster, modelless_run: type[ModellessRun], tmp_path: Path
):
    """Nodes without access to the run folder, and nodes without Slurm's commands, are named."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for folder in (cluster.local, cluster.folder / "nodes/n1"):
        (folder / "runs").symlink_to(shared)
    blind = modelless_run(cluster, cluster.local / "runs/run", [], nodes="2", sbatch={"nodelist": "n[1-2]"})
    reason = blind.wait_for("gave_up")[-1].reason
    assert reason.startswith(f"n2 cannot see {cluster.local}/runs/run/jobs/001, or ")

    blind = modelless_run(cluster, cluster.local / "runs/other", [], nodes="1", sbatch={"nodelist": "n2"})
    cluster.wait_for(blind.job, "FAILED")
    comment = f"Comment=n2 cannot see {cluster.local}/runs/other/jobs/001: put run.root on a file system"
    assert comment in cluster.run("scontrol", "show", "job", blind.job)

    without_slurm = modelless_run(cluster, tmp_path / "poor", [], nodes="1", setup=["PATH=/nowhere"])
    assert " has no scontrol in PATH, which the supervisor needs" in without_slurm.wait_for("gave_up")[-1].reason
    cluster.wait_for(without_slurm.job, "FAILED")


def test_impossible_submissions_are_refused_in_one_line(
    cluster: Cluster, modelless_run: type[ModellessRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    refused = "Slurm refuses the job: .*"
    with pytest.raises(ClusterError, match=f"{refused}Requested node configuration is not available"):
        modelless_run(cluster, tmp_path / "run", [], cpus_per_process=999)
    with pytest.raises(ClusterError, match=f"{refused}Requested node configuration is not available"):
        modelless_run(cluster, tmp_path / "run", [], nodes="99")
    assert not (tmp_path / "run").exists()

    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], check=True)
    try:
        with pytest.raises(ClusterError, match=f"cannot write to the run folder {small}/run: .*No space left"):
            modelless_run(cluster, small / "run", [])
    finally:
        subprocess.run(["umount", small], check=True)

    done = byteloom(
        cluster, tmp_path, "submit", write_recipe(tmp_path, tmp_path), "--cluster=cpu", "--partition=none", check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: Slurm refuses the job: invalid partition specified: none; ")
    assert len(done.stderr.splitlines()) == 1

    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        ClusterError, match="this machine has no sbatch: Slurm is not installed, or its environment module"
    ):
        modelless_run(cluster, tmp_path / "run", [])
