"""Job arrays of commands, submitted through submitit with a limit of tasks at once.

A task that was killed, or was asked to stop before its time limit, is requeued by its own batch script under the same
id. So the command must be one that resumes.
"""

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from launchers.slurm.calls import SchedulerError
from launchers.slurm.executors import accepted, import_submitit
from launchers.slurm.presets import ClusterConfig, ClusterError

RESTARTS = 5
"""Restarts of a task that is killed. A task that is asked to stop in time is restarted without a limit."""
# With an array's own id, scontrol would requeue all of its tasks. SIGUSR2, which Slurm sends before the time limit or a
# preemption, ends a command with 140. A job that was cancelled or lost its nodes is not requeued here. Slurm may not
# answer for minutes.
REQUEUE = f"""code=$?
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
if [ $code -eq 140 ] || {{ [ $code -gt 128 ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt {RESTARTS} ]; }}; then
    for pause in 1 2 4 8 15 30 60 60 60 60; do
        if state=$(squeue --noheader --jobs=$job --format=%T); then
            if [ "$state" != RUNNING ] || scontrol requeue $job; then break; fi
        fi
        sleep $pause
    done
fi
exit $code"""


def submit_commands(
    commands: Sequence[Sequence[str]],
    folder: Path,
    name: str,
    cluster: ClusterConfig,
    parallel: int,
    after: str | None = None,
) -> str:
    """Submit commands, each as one task on one node; return the id of the job or the array.

    Args:
        commands: words of each.
        folder: of batch scripts and logs.
        name: shown in the queue.
        cluster: resources of each task; its nodes and ranks are not used.
        parallel: largest number of tasks at once.
        after: a job or array that must have ended, in whatever way, before these start.

    Raises:
        ClusterError: there is no Slurm here, or it refuses.
        SchedulerError: Slurm does not answer.
    """
    if shutil.which("srun") is None:
        raise ClusterError("this machine has no srun: Slurm is not installed, or its environment module is not loaded")
    is_new = not folder.exists()
    submitit = import_submitit()
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(
        **cluster.as_submitit(),
        job_name=name,
        dependency=f"afterany:{after}" if after else None,
        cpus_per_task=cluster.cpus_per_process,
        array_parallelism=parallel,
        # srun of Slurm 22.05 to 23.02 does not take the processors from sbatch, and each start overwrites its log.
        srun_args=[f"--cpus-per-task={cluster.cpus_per_process}", "--open-mode=append", "--export=ALL"],
        setup=[*cluster.setup, "export PYTHONSAFEPATH=1"],  # ignore a folder named launchers here
        teardown=REQUEUE.splitlines(),
        additional_parameters={"requeue": True, **cluster.sbatch},
    )
    try:
        jobs = accepted(lambda: executor.map_array(exec_command, [list(command) for command in commands]), folder)
    except (ClusterError, SchedulerError):
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return str(jobs[0].job_id.partition("_")[0])


def exec_command(command: Sequence[str]) -> None:
    """Replace this process with the command of a task, so that Slurm's signals reach the command."""
    print(shlex.join(command), flush=True)
    os.execvp(command[0], list(command))
