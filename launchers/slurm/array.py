"""Commands as the tasks of a job array: submitit submits them, so many at once, each the same as a person would type.

A task that was killed, or asked to make room before its time limit, is put back into the queue by its own batch script,
under the same id: the command must be one that goes on where it was.
"""

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from launchers.slurm.executors import import_submitit
from launchers.slurm.presets import ClusterConfig, ClusterError, refusal

RESTARTS = 5
"""After so many, a task that is killed stays dead; one that is asked to make room is started again any number of times.
"""
# With an array's own id, scontrol would requeue all of its tasks. SIGUSR2, which Slurm sends before the time limit or a
# preemption, ends a command with 140. A job that was cancelled or lost its nodes is none of ours any more.
REQUEUE = f"""code=$?
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
if [ $code -eq 140 ] || {{ [ $code -gt 128 ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt {RESTARTS} ]; }}; then
    if [ "$(squeue --noheader --jobs=$job --format=%T)" = RUNNING ]; then scontrol requeue $job; fi
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
    """Submits commands, each as one task on one node; returns the id of the job or the array.

    Args:
        folder: of batch scripts and logs.
        name: that people see in the queue.
        cluster: what each task asks for; its nodes and ranks are none of ours.
        parallel: tasks at once, at most.
        after: a job or array that must be over before these begin, however it ends.

    Raises:
        ClusterError: there is no Slurm here, or it refuses.
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
        # srun of Slurm 22.05 to 23.02 does not take the processors from sbatch, and each start begins its log anew.
        srun_args=[f"--cpus-per-task={cluster.cpus_per_process}", "--open-mode=append"],
        setup=[*cluster.setup, "export PYTHONSAFEPATH=1"],  # a folder named launchers here is none of ours
        teardown=REQUEUE.splitlines(),
        additional_parameters={"requeue": True, **cluster.sbatch},
    )
    try:
        return executor.map_array(exec_command, [list(command) for command in commands])[0].job_id.partition("_")[0]
    except submitit.core.utils.FailedJobError as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise refusal(str(error)) from error


def exec_command(command: Sequence[str]) -> None:
    """What a task runs: this process becomes the command, which Slurm's signals then reach as they are."""
    print(shlex.join(command), flush=True)
    os.execvp(command[0], list(command))
