"""submitit, which is imported when something is submitted."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from byteloom.core.packages import needed_by
from launchers.environment import clean_environment, replaced_environment
from launchers.slurm import calls
from launchers.slurm.presets import refusal

T = TypeVar("T")


def import_submitit() -> ModuleType:
    """Return submitit, with the modules of it that launchers use.

    Raises:
        MissingPackageError: it is not installed.
    """
    with needed_by("a submission", "submitit"):
        importlib.import_module("submitit.slurm.slurm")
        return importlib.import_module("submitit")


def accepted(submit: Callable[[], T], folder: Path) -> T:
    """Return what a submission through submitit returns. Repeat it while Slurm does not answer.

    Args:
        submit: submits a job or an array, in an environment without the shell's variables of Slurm.
        folder: of its batch script.

    Raises:
        ClusterError: Slurm refuses.
        SchedulerError: Slurm does not answer.
    """
    failed_job_error = import_submitit().core.utils.FailedJobError

    def attempt() -> T:
        try:
            with replaced_environment(clean_environment()):
                return submit()
        except failed_job_error as error:
            if calls.is_passing(str(error)):
                raise calls.PassingError(calls.last_line(str(error))) from error
            raise refusal(str(error)) from error

    return calls.repeated(attempt, calls.FOR_PERSON, "sbatch", before_retry=lambda error: _cancel_unanswered(folder))


def _cancel_unanswered(folder: Path) -> None:
    """Cancel the job of a folder whose submission was accepted, if only the answer was lost."""
    for line in calls.look("squeue", "--me", "--noheader", "--format=%F %o").splitlines():
        job, _, script = line.partition(" ")
        if script.startswith(f"{folder}/"):
            calls.ask("scancel", job)
