"""Submissions from within other jobs, to odd folders, and to a cluster that would let the job wait."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers.slurm import scheduler
from launchers.slurm.hosts import expand_hosts
from launchers.slurm.limits import why_it_would_wait
from launchers.slurm.presets import ClusterConfig
from tests.launchers.test_environment import OF_ANOTHER_JOB
from tests.slurm.cluster import Cluster, running_cluster
from tests.slurm.test_submit import NO_DEVICES, ModellessRun, modelless_run  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), nodes=2) as cluster:
        yield cluster


@pytest.mark.parametrize(
    ("name", "sbatch"),
    [
        pytest.param("plain", {}, marks=pytest.mark.long),
        ('a space, it\'s "quoted" and 100%j $HOME', {}),
        ("none", {"export": "NONE"}),
    ],
)
def test_job_submitted_from_within_another_job_trains_in_any_folder(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811 - the fixture
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    sbatch: dict[str, str | int | bool],
):
    for variable, value in OF_ANOTHER_JOB.items():
        monkeypatch.setenv(variable, value)
    root = Path(__file__).parents[2]
    starts = [{"rank": 1, "does": "die"}, {"does": "finish"}]
    run = modelless_run(cluster, tmp_path / name, starts, nodes="2", sbatch=sbatch, setup=[f"export PYTHONPATH={root}"])
    launches = run.wait_for("finished")
    assert [launch.event for launch in launches] == ["submitted", "started", "failed", "started", "finished"]
    assert launches[2].reason.endswith("Killed")


def test_reasons_why_a_job_would_wait(cluster: Cluster, modelless_run: object):  # noqa: F811 - names the cluster
    wanted = ClusterConfig(partition="low", nodes="2", time="120")
    assert why_it_would_wait(wanted) == []
    try:
        cluster.run("scontrol", "update", "PartitionName=low", "MaxTime=60")
        cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
        assert why_it_would_wait(wanted) == [
            "the time 120 is above the limit of partition low, 01:00:00",
            "1 of the 2 nodes of partition low can be used now, and the job needs 2; the others are down or drained",
        ]
    finally:
        cluster.run("scontrol", "update", "PartitionName=low", "MaxTime=INFINITE")
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")


def test_excluded_nodes_add_up(cluster: Cluster, modelless_run: object):  # noqa: F811 - names the cluster
    job = cluster.run("sbatch", "--parsable", "--hold", "--partition=low", "--exclude=n1", "--wrap=true")
    scheduler.exclude(job, ["n2"])
    assert expand_hosts(cluster.job(job)["ExcNodeList"]) == ["n1", "n2"]
    cluster.run("scancel", job)


def test_ranks_have_a_prefix_and_options_of_srun(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811 - the fixture
    tmp_path: Path,
):
    run = modelless_run(
        cluster,
        tmp_path / "run",
        [{"does": "finish"}],
        nodes="1",
        gpus_per_node="2",
        unchecked=NO_DEVICES,
        srun={"gpus-per-task": 1, "label": True},
        prefix=["sh", "-c", 'echo prefixed; exec "$@"', "--"],
    )
    run.wait_for("finished")
    outputs = sorted((tmp_path / "run/jobs/001/ranks").glob("*.log"))
    printed = [path.read_text().splitlines() for path in outputs]
    assert sorted(line for lines in printed for line in lines if "prefixed" in line) == [
        "0: prefixed",
        "1: prefixed",
    ], printed
    assert sorted(line for lines in printed for line in lines if line.startswith("GPUs")) == ["GPUs 0", "GPUs 1"]
