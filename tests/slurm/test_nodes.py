"""Checks of nodes before a start, and spare nodes, with a real Slurm; tests/launchers/test_checks.py needs none."""

from pathlib import Path

import pytest

from launchers.supervision.plan import SuperviseConfig
from launchers.supervision.record import Launch
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.test_classes import wait_for_ranks
from tests.slurm.test_submit import ModellessRun, modelless_run  # noqa: F401 a fixture

FAILS_ON_N2 = 'if [ "$SLURMD_NODENAME" = n2 ]; then echo "fan 3 stands still" >&2; exit 1; fi'


def story(launches: list[Launch]) -> list[tuple[str, str, str]]:
    """Return the events after the submission: event, blamed node, nodes of a start."""
    return [
        (launch.event, launch.faulty, ",".join(launch.nodes) if launch.event == "started" else "")
        for launch in launches
        if launch.event != "submitted"
    ]


def test_spare_takes_the_place_of_a_node_that_fails_its_check(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    run = modelless_run(cluster, tmp_path / "run", [{"does": "finish"}], nodes="2", spares=1, check=[FAILS_ON_N2])
    launches = run.wait_for("finished")
    assert story(launches) == [("excluded", "n2", ""), ("started", "", "n1,n3"), ("finished", "", "")]
    assert launches[1].fault == "node"
    assert launches[1].reason == "check lines: fan 3 stands still; n3 takes its place"
    assert cluster.job(run.job)["Restarts"] == "0"


@pytest.mark.long
def test_spare_takes_the_place_of_the_first_node_and_a_requeued_job_does_without_that_node(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    starts = [{"rank": 0, "does": "die"}, {"does": "wait"}, {"does": "finish"}]
    limits = SuperviseConfig(faults_of_node=1, step_seconds=30)
    run = modelless_run(cluster, tmp_path / "run", starts, limits, nodes="1-2", spares=1)
    wait_for_ranks(run.run, 2, start=1)
    cluster.run("scancel", "--signal=USR2", run.job)
    launches = run.wait_for("finished")
    assert story(launches) == [
        ("started", "", "n1,n2"), ("failed", "n1", ""), ("excluded", "n1", ""),
        ("started", "", "n2,n3"), ("stopped", "", ""), ("requeued", "", ""),
        ("started", "", "n2,n3"), ("finished", "", ""),
    ]  # fmt: skip
    assert launches[3].reason == "1 failure began on n1; n3 takes its place"
    assert cluster.job(run.job)["ExcNodeList"] == "n1"
    assert cluster.job(run.job)["NodeList"] == "n[2-4]"


@pytest.mark.long
def test_node_that_fails_its_check_is_left_through_the_queue_where_there_is_no_spare(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    run = modelless_run(cluster, tmp_path / "run", [{"does": "finish"}], nodes="2-3", check=[FAILS_ON_N2])
    launches = run.wait_for("finished")
    assert story(launches) == [
        ("excluded", "n2", ""), ("requeued", "", ""), ("started", "", "n1,n3,n4"), ("finished", "", ""),
    ]  # fmt: skip
    assert cluster.job(run.job)["ExcNodeList"] == "n2"


@pytest.mark.long
def test_check_that_fails_on_all_nodes_gives_the_run_up(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    run = modelless_run(cluster, tmp_path / "run", [], nodes="2", check=["cat /nowhere"])
    [reason] = [launch.reason for launch in run.wait_for("gave_up") if launch.event == "gave_up"]
    assert reason.startswith(
        "all nodes fail the same check, so it is not theirs; check lines: cat /nowhere: exit code 1; see "
    )


@pytest.mark.long
def test_spare_takes_the_place_of_a_lost_node_and_a_lost_supervisor_comes_back(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    starts = [{"does": "work"}, {"does": "work"}, {"does": "finish"}]
    run = modelless_run(cluster, tmp_path / "run", starts, nodes="2", spares=1)
    wait_for_ranks(run.run, 2)
    try:
        cluster.crash("n2")
        wait_for_ranks(run.run, 2, start=1)
        assert cluster.job(run.job)["Restarts"] == "0"
        cluster.start_node("n2")
        cluster.crash("n1")
        launches = run.wait_for("finished")
    finally:
        cluster.start_node("n1")
        wait_until(lambda: cluster.run("sinfo", "-hNn", "n1", "-o%t").startswith("idle"), "n1 is back", 60)
    assert story(launches) == [
        ("started", "", "n1,n2"), ("failed", "n2", ""), ("excluded", "n2", ""), ("started", "", "n1,n3"),
        ("failed", "n1", ""), ("started", "", "n3,n4"), ("finished", "", ""),
    ]  # fmt: skip
    assert launches[3].reason == "lost n2; n3 takes its place"
