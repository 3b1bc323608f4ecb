"""State of Slurm jobs, and commands that change it. Every call asks Slurm again.

slurmctld is asked first. Accounting lags behind it and is not on every cluster, so it is asked only about jobs that
slurmctld has forgotten. submitit's own answer is not used: it keeps NODE_FAIL while Slurm runs the job again.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from byteloom.core.retries import RetryPolicy
from launchers.slurm.calls import FOR_PERSON, IN_JOB, ONCE, SchedulerError, ask, last_line
from launchers.slurm.hosts import expand_hosts


class JobPhase(StrEnum):
    """Phase of a job, in the words that people see."""

    QUEUED = "queued"
    """It waits for its first start."""
    RUNNING = "running"
    SUSPENDED = "suspended"
    """Its processes are stopped, by `scontrol suspend` or for another job, until Slurm continues them."""
    ENDING = "ending"
    """Slurm is ending its processes, and may requeue it afterwards."""
    REQUEUED = "requeued"
    """It waits for another start."""
    HELD = "held"
    """It waits for a person to release it."""
    RETURNING = "returning"
    """It has lost a node or was preempted, and Slurm is about to requeue it."""
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    FORGOTTEN = "forgotten"
    """Slurm does not know it, or has forgotten it."""
    UNKNOWN = "unknown"
    """Slurm cannot be asked."""

    @property
    def is_alive(self) -> bool:
        """Return whether the job runs, or waits to run."""
        return self not in (
            JobPhase.FINISHED,
            JobPhase.FAILED,
            JobPhase.CANCELLED,
            JobPhase.FORGOTTEN,
            JobPhase.UNKNOWN,
        )


@dataclass(frozen=True)
class Job:
    """One job, or one element of an array."""

    id: str
    """Id as people type it: 12, or 12_3 in an array."""
    phase: JobPhase
    state: str = ""
    """Slurm's name of the state."""
    reason: str = ""
    """Slurm's reason why it waits or ended, or the reason why nothing is known."""
    restarts: int = 0
    nodes: str = ""
    """Nodes in Slurm's form: n[1-2]."""


def job(job_id: str, policy: RetryPolicy = ONCE) -> Job:
    """Return the state of one job, or of one element of an array.

    Raises:
        SchedulerError: Slurm cannot be asked.
    """
    return jobs(job_id, policy)[0]


def jobs(job_id: str, policy: RetryPolicy = ONCE) -> list[Job]:
    """Return the states of a job, or of all elements of an array, in order.

    Raises:
        SchedulerError: Slurm cannot be asked.
    """
    asked = ask("scontrol", "--oneliner", "show", "job", job_id, policy=policy)
    if asked.returncode == 0:
        found = [each for line in asked.stdout.splitlines() for each in _of_controller(line)]
        return sorted(found, key=lambda each: _element(each.id))
    if "Invalid job id" not in asked.stderr and "not found" not in asked.stdout:
        raise SchedulerError(f"Slurm does not answer: {last_line(asked.stderr)}")
    return _of_accounting(job_id)


def cancel(job_id: str) -> None:
    """Cancel a waiting or running job. Its ranks get SIGTERM, and SIGKILL after KillWait.

    Raises:
        SchedulerError: the job is unknown or has ended, or Slurm refuses.
    """
    known = jobs(job_id, FOR_PERSON)
    if not any(each.phase.is_alive for each in known):
        raise SchedulerError(f"job {job_id} is {known[0].phase}" + (f": {known[0].reason}" if known[0].reason else ""))
    answer("scancel", job_id)


def requeue(job_id: str) -> None:
    """Requeue a running job under the same id. A job calls this for itself, and waits for minutes if it must.

    Raises:
        SchedulerError: Slurm refuses. A job that waits already is no error.
    """
    asked = ask("scontrol", "requeue", job_id, policy=IN_JOB)
    if asked.returncode and "pending execution" not in asked.stderr:
        raise SchedulerError(f"job {job_id} cannot be requeued: {last_line(asked.stderr)}")


def exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Add to the nodes that a waiting job must not get.

    Raises:
        SchedulerError: Slurm refuses.
    """
    shown = answer("scontrol", "--oneliner", "show", "job", job_id)
    earlier = re.search(r" ExcNodeList=(\S+)", shown)  # of the submission, or of earlier failures
    names = expand_hosts(earlier[1]) if earlier and earlier[1] != "(null)" else []
    answer("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(dict.fromkeys([*names, *nodes]))}")


def answer(*command: str) -> str:
    """Return what a command of Slurm prints.

    Raises:
        SchedulerError: the command fails.
    """
    asked = ask(*command)
    if asked.returncode:
        raise SchedulerError(f"{' '.join(command)}: {last_line(asked.stderr)}")
    return asked.stdout


def _of_controller(line: str) -> list[Job]:
    """Return the jobs of a line of `scontrol show job`: one, or the elements of an array that wait together."""
    fields = dict(re.findall(r"(?:^| )([A-Za-z:/]+)=(\S*)", line))
    # A job that was held or waited when it was cancelled keeps the reason of its wait.
    reason = "" if fields["Reason"] == "None" or fields["JobState"] == "CANCELLED" else fields["Reason"]
    nodes = fields.get("NodeList", "").removeprefix("(null)")
    restarts = int(fields.get("Restarts", 0))
    returns = fields.get("Requeue") == "1" and fields.get("BatchFlag") == "1"
    phase = _phase(fields["JobState"], reason, restarts, returns)
    elements = _expanded(fields["ArrayTaskId"]) if "ArrayTaskId" in fields else []
    ids = [f"{fields['ArrayJobId']}_{element}" for element in elements] or [fields["JobId"]]
    return [Job(each, phase, fields["JobState"], reason, restarts, nodes) for each in ids]


def _phase(state: str, reason: str, restarts: int, returns: bool) -> JobPhase:
    """Return the phase of a job.

    Args:
        state: Slurm's name of it.
        reason: Slurm's reason why the job waits.
        restarts: number of earlier starts.
        returns: whether Slurm requeues the job if a node fails or the job is preempted.
    """
    if state == "PENDING":
        if "Held" in reason or "held" in reason:
            return JobPhase.HELD
        return JobPhase.REQUEUED if restarts else JobPhase.QUEUED
    if state in ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL") and returns:
        return JobPhase.RETURNING
    return _PHASES.get(state, JobPhase.FAILED)


_PHASES = {
    "RUNNING": JobPhase.RUNNING,
    "CONFIGURING": JobPhase.RUNNING,
    "RESIZING": JobPhase.RUNNING,
    "SIGNALING": JobPhase.RUNNING,
    "SUSPENDED": JobPhase.SUSPENDED,
    "STOPPED": JobPhase.SUSPENDED,
    "COMPLETING": JobPhase.ENDING,
    "STAGE_OUT": JobPhase.ENDING,
    "REQUEUED": JobPhase.REQUEUED,
    "REQUEUE_FED": JobPhase.REQUEUED,
    "REQUEUE_HOLD": JobPhase.HELD,
    "SPECIAL_EXIT": JobPhase.HELD,
    "RESV_DEL_HOLD": JobPhase.HELD,
    "COMPLETED": JobPhase.FINISHED,
    "CANCELLED": JobPhase.CANCELLED,
    "REVOKED": JobPhase.CANCELLED,
}
"""Phases by Slurm's states, without states that depend on more. Every other state is a failure."""


def _of_accounting(job_id: str) -> list[Job]:
    """Return the jobs of an id that slurmctld does not know."""
    columns = "JobID,State,NodeList"
    asked = ask(
        "sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job_id, "--format", columns, policy=ONCE
    )
    if asked.returncode and "disabled" not in asked.stderr:
        raise SchedulerError(f"Slurm's accounting does not answer: {last_line(asked.stderr)}")
    if asked.returncode:
        return [Job(job_id, JobPhase.FORGOTTEN, reason="Slurm has forgotten it, and keeps no accounting")]
    rows = [line.split("|") for line in asked.stdout.splitlines()]
    return [_accounted(*row) for row in rows] or [Job(job_id, JobPhase.FORGOTTEN, reason="Slurm does not know it")]


def _accounted(job_id: str, words: str, nodes: str) -> Job:
    state = words.partition(" ")[0]  # "CANCELLED by 1000"
    phase = _phase(state, "", 0, returns=False)
    if phase.is_alive:  # slurmctld was killed before it had saved what it knew
        return Job(job_id, JobPhase.FORGOTTEN, state, "Slurm has lost it")
    return Job(job_id, phase, state, nodes="" if nodes == "None assigned" else nodes)


def _expanded(elements: str) -> list[int]:
    """Return the elements of an array that a text such as "0,2-5%2" names."""
    ranges = (part.partition("-") for part in elements.partition("%")[0].split(","))
    return [number for first, _, last in ranges for number in range(int(first), int(last or first) + 1)]


def _element(job_id: str) -> int:
    return int(job_id.partition("_")[2] or 0)
