"""Failures by class on a real cluster: Slurm that does not answer, suspended jobs, nodes and code that fail.

The supervisor and the scheduler are real; the ranks have no model. tests/launchers/test_classes.py has what needs no
cluster.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from launchers.slurm import scheduler
from launchers.slurm.scheduler import JobPhase
from launchers.supervision.plan import SuperviseConfig
from launchers.supervision.record import Launch
from pretrain.training.run_status import status_of
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.test_submit import ModellessRun, modelless_run  # noqa: F401 a fixture
from tests.slurm.wrappers import fail_at_first

pytestmark = pytest.mark.long

NO_CONTACT = "Unable to contact slurm controller (connect failure)"
TIMED_OUT = "Socket timed out on send/recv operation"
ONE_ATTEMPT = SuperviseConfig(attempts=1, step_seconds=30)


def story(launches: list[Launch]) -> list[tuple[str, str]]:
    """Return the events and their classes, without the submission."""
    return [(launch.event, launch.fault) for launch in launches if launch.event != "submitted"]


def wait_for_ranks(run: Path, count: int, start: int = 0) -> None:
    beats = run / f"jobs/001/heartbeats/start-{start}"
    wait_until(lambda: len(list(beats.glob("rank-*.json"))) == count, f"{count} ranks", 60)


def test_slurm_that_fails_for_a_while_is_nobodys_fault(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Each command fails: sbatch loses an answer, srun fails before and as the ranks start, a requeue times out."""
    of_person, of_job, of_steps = (tmp_path / name for name in ("person", "job", "steps"))
    fail_at_first(of_person, "sbatch", 1, f"sbatch: error: Batch job submission failed: {TIMED_OUT}",
                  "*submission_file*", does_it=True)  # fmt: skip
    fail_at_first(of_steps, "srun", 2, f"srun: error: Unable to create step for job 1: {TIMED_OUT}", "*launchers.rank*")
    fail_at_first(of_job, "srun", 3, f"srun: error: {NO_CONTACT}", "*--chdir=/*", of_steps / "srun")
    fail_at_first(of_job, "scontrol", 1, f"{TIMED_OUT} for job", "*requeue*")
    monkeypatch.setenv("PATH", f"{of_person}:{os.environ['PATH']}")
    run = modelless_run(
        cluster, tmp_path / "run", [{"does": "wait"}] * 3 + [{"does": "finish"}], ONE_ATTEMPT,
        nodes="2", setup=[f"export PATH={of_job}:$PATH"],
    )  # fmt: skip
    names = cluster.run("squeue", "--noheader", "--format=%A", "--name=run").split()
    assert names == [run.job]  # the job whose answer was lost is cancelled
    run.wait_for("started", 3)
    wait_for_ranks(run.run, 2, start=2)
    cluster.run("scancel", "--signal=USR2", run.job)
    assert story(run.wait_for("finished")) == [
        *(("started", ""), ("failed", "scheduler")) * 2,
        ("started", ""), ("stopped", ""), ("requeued", ""), ("started", ""), ("finished", ""),
    ]  # fmt: skip
    left = [path.read_text() for folder in (of_person, of_job, of_steps) for path in folder.glob("*.left")]
    assert left == ["0\n"] * 4


def test_slurmctld_that_restarts_as_the_job_begins_is_waited_for(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    run = modelless_run(cluster, tmp_path / "run", [{"does": "finish"}], ONE_ATTEMPT, nodes="2", setup=["sleep 2"])
    cluster.wait_for(run.job, "RUNNING")
    cluster.stop_controller()
    log = run.run / "jobs/001/batch.log"
    wait_until(lambda: log.exists() and "attempt 3" in log.read_text(), "srun has failed", 60)
    cluster.continue_controller()
    assert story(run.wait_for("finished")) == [("started", ""), ("finished", "")]


def test_ranks_start_beside_a_step_that_slurm_has_not_ended(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    """A slurmstepd that cannot reach slurmctld when its step ends tries again after 60 s; nothing waits for it."""
    starts = [{"does": "wait"}, {"does": "wait"}, {"does": "finish"}]
    run = modelless_run(cluster, tmp_path / "run", starts, ONE_ATTEMPT, nodes="2")
    wait_for_ranks(run.run, 2)
    [victim] = cluster.processes(run.job, rank=1)
    cluster.stop_controller()
    os.kill(victim, signal.SIGKILL)
    logs = [cluster.folder / f"log/slurmd.{node}.log" for node in cluster.nodes]
    in_vain = re.compile(rf"\[{run.job}\.\d+\] error: .*failed sending step completion message")
    wait_until(lambda: any(in_vain.search(log.read_text()) for log in logs), "slurmstepd cannot reach slurmctld", 60)
    cluster.continue_controller()
    wait_for_ranks(run.run, 2, start=1)
    names = cluster.run("squeue", "--steps", f"--jobs={run.job}", "--noheader", "--format=%j").split()
    assert {"start-0", "start-1"} <= set(names)
    cluster.run("scancel", "--signal=USR2", run.job)
    assert story(run.wait_for("finished")) == [
        ("started", ""), ("failed", "node"), ("started", ""), ("stopped", ""), ("requeued", ""),
        ("started", ""), ("finished", ""),
    ]  # fmt: skip


def test_suspended_job_has_not_hung(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    limits = SuperviseConfig(attempts=1, step_seconds=6)
    run = modelless_run(cluster, tmp_path / "run", [{"does": "work"}], limits, nodes="2")
    wait_for_ranks(run.run, 2)
    cluster.run("scontrol", "suspend", run.job)
    wait_until(lambda: scheduler.job(run.job).phase is JobPhase.SUSPENDED, "the job is suspended", 30)
    assert status_of(run.run).state == "suspended"
    time.sleep(10)  # longer than a step may take
    cluster.run("scontrol", "resume", run.job)
    time.sleep(2)
    (run.run / "done").touch()
    assert story(run.wait_for("finished")) == [("started", ""), ("finished", "")]


def test_failure_that_strikes_a_second_node_is_a_fault_of_the_code(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    limits = SuperviseConfig(attempts=1, faults_of_node=1, step_seconds=30)
    run = modelless_run(cluster, tmp_path / "run", [{"rank": 1, "does": "die"}], limits, nodes="2")
    launches = run.wait_for("gave_up")
    assert story(launches) == [
        ("started", ""), ("failed", "node"), ("excluded", "node"), ("requeued", ""),
        ("started", ""), ("failed", "code"), ("gave_up", ""),
    ]  # fmt: skip
    failures = [launch.faulty for launch in launches if launch.event == "failed"]
    assert failures == [launches[1].nodes[1], ""]


def test_node_of_a_slow_rank_is_excluded_from_the_next_start(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    limits = SuperviseConfig(exclude_slow=True, step_seconds=30)
    starts = [{"does": "fail", "rank": 1, "slow": 1, "checkpoint": 1}, {"does": "finish"}]
    run = modelless_run(cluster, tmp_path / "run", starts, limits, nodes="2")
    launches = run.wait_for("finished")
    assert story(launches) == [
        ("started", ""), ("slow", ""), ("failed", "code"), ("excluded", "node"), ("requeued", ""),
        ("started", ""), ("finished", ""),
    ]  # fmt: skip
    node = launches[1].nodes[1]
    reason = f"rank 1 on {node} is 30 % slower than the median"
    assert {(launch.faulty, launch.reason) for launch in launches if launch.event in ("slow", "excluded")} == {
        (node, reason)
    }
    assert node == cluster.job(run.job)["ExcNodeList"] and node not in launches[-1].nodes


def test_requeue_from_a_drained_node_blames_no_node(
    cluster: Cluster,
    modelless_run: type[ModellessRun],  # noqa: F811
    tmp_path: Path,
):
    run = modelless_run(cluster, tmp_path / "run", [{"does": "wait"}, {"does": "finish"}], ONE_ATTEMPT, nodes="2")
    wait_for_ranks(run.run, 2)
    node = run.wait_for("started")[-1].nodes[1]
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    try:
        cluster.run("scontrol", "requeue", run.job)
        launches = run.wait_for("finished")
    finally:
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert story(launches) == [("started", ""), ("stopped", ""), ("started", ""), ("finished", "")]
    assert launches[2].reason.endswith("an administrator requeued the job")
    assert node not in launches[-1].nodes
