"""Reported phases of jobs on a real cluster, also while Slurm ends a job and restarts it."""

from pathlib import Path

import pytest

from launchers.slurm import scheduler
from launchers.slurm.scheduler import JobPhase, SchedulerError
from tests.slurm.cluster import Cluster, running_cluster, wait_until


@pytest.fixture(autouse=True)
def _use_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])


def submit(cluster: Cluster, script: str, *options: str) -> str:
    output = f"--output={cluster.folder}/%j.out"
    return cluster.run("sbatch", "--parsable", output, *options, f"--wrap={script}")


def phases_until(job: str, *phases: JobPhase, seconds: float = 60) -> list[JobPhase]:
    """Wait for one of the phases; return the sequence of phases that were observed."""
    phases_seen: list[JobPhase] = []

    def look() -> bool:
        phase = scheduler.job(job).phase
        if phase not in phases_seen[-1:]:
            phases_seen.append(phase)
        return phase in phases

    wait_until(look, f"job {job} is {' or '.join(phases)}", seconds)
    return phases_seen


def test_job_is_queued_then_running_then_ended(cluster: Cluster):
    good, bad, endless = (submit(cluster, script) for script in ("true", "exit 3", "sleep 600"))
    waiting = submit(cluster, "true", "--begin=now+1hour")
    held = submit(cluster, "true", "--hold")
    phases_until(endless, JobPhase.RUNNING)
    assert scheduler.job(endless).nodes in cluster.nodes
    assert phases_until(good, JobPhase.FINISHED)[-1:] == [JobPhase.FINISHED]
    phases_until(bad, JobPhase.FAILED)
    assert (scheduler.job(waiting).phase, scheduler.job(waiting).reason) == (JobPhase.QUEUED, "BeginTime")
    assert scheduler.job(held).phase is JobPhase.HELD
    for job in (endless, waiting, held):
        scheduler.cancel(job)
        phases_until(job, JobPhase.CANCELLED)
    with pytest.raises(SchedulerError, match=f"job {endless} is cancelled"):
        scheduler.cancel(endless)


def test_every_array_element_has_its_own_phase(cluster: Cluster):
    array = submit(cluster, "test $SLURM_ARRAY_TASK_ID = 1 && exit 1; sleep $SLURM_ARRAY_TASK_ID", "--array=0-3%2")
    assert [job.id for job in scheduler.jobs(array)] == [f"{array}_{number}" for number in range(4)]
    phases_until(f"{array}_1", JobPhase.FAILED)
    phases_until(f"{array}_0", JobPhase.FINISHED)
    phases_until(f"{array}_2", JobPhase.RUNNING)
    scheduler.cancel(f"{array}_2")
    phases_until(f"{array}_3", JobPhase.FINISHED)
    phases_until(f"{array}_2", JobPhase.CANCELLED)


def test_requeued_job_is_never_reported_as_ended(cluster: Cluster):
    job = submit(cluster, "sleep 600")
    phases_until(job, JobPhase.RUNNING)
    scheduler.requeue(job)
    scheduler.requeue(job)  # the job waits already, or is about to wait
    phases_seen = phases_until(job, JobPhase.REQUEUED)
    scheduler.exclude(job, [scheduler.job(job).nodes or "n1", "n2"])
    phases_seen += phases_until(job, JobPhase.RUNNING)
    assert set(phases_seen) <= {JobPhase.RUNNING, JobPhase.ENDING, JobPhase.REQUEUED}
    assert scheduler.job(job).restarts == 1
    assert scheduler.job(job).nodes != "n2"
    scheduler.cancel(job)


@pytest.mark.long
def test_job_that_lost_its_node_runs_again(cluster: Cluster):
    job = submit(cluster, "sleep 600", "--nodelist=n3")
    phases_until(job, JobPhase.RUNNING)
    cluster.crash("n3")
    phases_seen = phases_until(job, JobPhase.REQUEUED)
    cluster.start_node("n3")
    phases_seen += phases_until(job, JobPhase.RUNNING)
    assert set(phases_seen) <= {JobPhase.RUNNING, JobPhase.ENDING, JobPhase.RETURNING, JobPhase.REQUEUED}
    scheduler.cancel(job)


def test_forgotten_job_and_missing_slurm_are_reported_in_one_line(cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    assert scheduler.job("1").phase is JobPhase.FORGOTTEN
    assert scheduler.job("1").reason == "Slurm has forgotten it, and keeps no accounting"
    with pytest.raises(SchedulerError, match="job 1 is forgotten: Slurm has forgotten it, and keeps no accounting"):
        scheduler.cancel("1")
    with pytest.raises(SchedulerError, match="job 1 cannot be requeued: Invalid job id"):
        scheduler.requeue("1")
    with monkeypatch.context() as patch:
        patch.delenv("SLURM_CONF")
        with pytest.raises(SchedulerError, match="Slurm does not answer: "):
            scheduler.job("1")
        patch.setenv("PATH", "")
        with pytest.raises(SchedulerError, match="this machine has no scontrol: Slurm is not installed"):
            scheduler.job("1")


@pytest.mark.long
def test_accounting_reports_jobs_that_slurm_has_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with running_cluster(tmp_path / "cluster", nodes=1, accounting=True) as cluster:
        monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        good, bad, endless = (submit(cluster, script) for script in ("true", "exit 3", "sleep 600"))
        phases_until(good, JobPhase.FINISHED)
        phases_until(bad, JobPhase.FAILED)
        scheduler.cancel(endless)
        phases_until(endless, JobPhase.CANCELLED)
        wait_until(lambda: "CANCELLED" in cluster.run("sacct", "-X", "-j", endless), "sacct knows of it", 30)
        cluster.restart_controller()
        assert [scheduler.job(job).phase for job in (good, bad, endless)] == [
            JobPhase.FINISHED, JobPhase.FAILED, JobPhase.CANCELLED,
        ]  # fmt: skip
        assert scheduler.job("1").reason == "Slurm does not know it"


def test_cluster_leaves_no_process_behind(tmp_path: Path):
    with running_cluster(tmp_path / "cluster", nodes=1) as cluster:
        cluster.wait_for(submit(cluster, "sleep 600"), "RUNNING")
        assert len(cluster.all_processes()) > 5
    # slurmscriptd, a child of slurmctld, ends by itself after it.
    wait_until(lambda: not cluster.all_processes(), "no process of the cluster is left", 30)
