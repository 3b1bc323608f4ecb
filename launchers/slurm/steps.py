"""Steps of the job of this process: which ones Slurm has not ended, and whether they have processes.

A slurmstepd that cannot reach slurmctld when its step ends tries again after a minute. Until then, Slurm calls the
processors of the step busy, and a new step waits. Such a step has no process on any node, and a new one may use its
processors (`--overlap`).
"""

import logging
import time
from collections.abc import Callable, Sequence

from launchers.slurm import calls

STEP_SECONDS = 2.0
"""Time that Slurm has to end a step whose ranks have ended."""
POLL_SECONDS = 0.1
"""Time between two looks at the steps."""
NO_PROCESS = "no process"
"""Answer of a node without processes of the steps."""
LOOK = f"""
listed() {{ scontrol listpids "$SLURM_JOB_ID.$1" "$SLURMD_NODENAME" 2> /dev/null | grep -q '^ *[0-9]'; }}
listed "$SLURM_STEP_ID" || exit 0
for step in "$@"; do if listed "$step"; then exit 0; fi; done
echo {NO_PROCESS}
"""
"""Shell script for each node, with the numbers of steps. It answers only if it sees its own process in the same way."""

log = logging.getLogger(__name__)


def steps_of(job: str, is_wanted: Callable[[str], bool]) -> list[str]:
    """Return the ids of the steps of a job that Slurm has not ended; none if it does not answer.

    Args:
        job: the job.
        is_wanted: whether a step of this name is returned.
    """
    asked = calls.look("squeue", "--steps", f"--jobs={job}", "--noheader", "--format=%i %j")
    named = [line.split(maxsplit=1) for line in asked.splitlines()]  # a name may have spaces, or be empty
    return [words[0] for words in named if len(words) == 2 and is_wanted(words[1].rstrip())]


def has_dead_steps(job: str, nodes: Sequence[str], is_wanted: Callable[[str], bool]) -> bool:
    """Return whether Slurm holds processors for steps of this job that have no process.

    Args:
        job: the job.
        nodes: nodes that must have no process of the steps.
        is_wanted: whether a step of this name counts.

    Raises:
        SchedulerError: Slurm does not answer.
    """
    deadline = time.monotonic() + STEP_SECONDS
    while steps := steps_of(job, is_wanted):
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_SECONDS)
    else:
        return False
    done = calls.ask(
        *("srun", *options_beside_ranks(nodes)),
        *("sh", "-c", LOOK, "look", *(step.rpartition(".")[2] for step in steps)),
        policy=calls.IN_JOB,
        environment=environment_beside_ranks(),
        passing=(calls.ANY_WORDS,),
    )
    is_dead = done.stdout.count(NO_PROCESS) == len(nodes)
    log.info("Slurm has not ended step %s, which %s", ", ".join(steps), "has no process" if is_dead else "still runs")
    return is_dead


def options_beside_ranks(nodes: Sequence[str]) -> list[str]:
    """Return options of `srun` for a step of one task on each node, which takes no processors or GPUs of the ranks."""
    size = [f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1"]
    return ["--overlap", "--gres=none", *size, "--chdir=/", "--export=ALL"]


def environment_beside_ranks() -> dict[str, str]:
    """Return the environment of `srun` for such a step."""
    return {name: value for name, value in calls.step_environment().items() if not name.startswith("SLURM_GPUS")}
