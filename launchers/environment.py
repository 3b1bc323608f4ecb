"""Environment and streams of the processes that a submission starts."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

OF_SLURM = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_", "SCONTROL_", "SSTAT_")
"""First letters of variables that describe a job, or change what Slurm's commands do and print."""
OF_MPI = ("PMI", "OMPI_", "PRTE_", "MPI_LOCAL", "TORCHELASTIC_")
"""First letters of variables of other launchers."""
OF_A_RANK = {"RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Variables of torchrun."""
OF_ITS_DEVICES = {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "GPU_DEVICE_ORDINAL"}
"""Variables that Slurm sets in a job with GPUs."""
OF_A_PERSON = {
    "SLURM_CONF",
    "SLURM_CONF_SERVER",
    "SLURM_JWT",
    "SLURM_SACK_KEY",
    "SBATCH_ACCOUNT",
    "SBATCH_PARTITION",
    "SBATCH_QOS",
    "SBATCH_RESERVATION",
    "SBATCH_WCKEY",
}
"""Variables that stay: where Slurm is, and who pays for which nodes. Slurm sets none of them in a job."""


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment in which Slurm's commands are called and jobs are submitted. Slurm copies it into the job.

    A job that is submitted from within another job must not take itself for that one.
    """
    devices = OF_ITS_DEVICES if "SLURM_JOB_ID" in environment else set()
    return {
        name: value
        for name, value in environment.items()
        if name in OF_A_PERSON or not (name.startswith((*OF_SLURM, *OF_MPI)) or name in OF_A_RANK | devices)
    }


@contextmanager
def replaced_environment(environment: Mapping[str, str]) -> Iterator[None]:
    """Give this process an environment within a block, for libraries that pass on the one they find."""
    earlier = dict(os.environ)
    os.environ.clear()
    os.environ |= environment
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= earlier


@contextmanager
def silenced_streams() -> Iterator[None]:
    """Give the processes that are started within a block no standard output and error of this one.

    A process that outlives this one would keep its pipe open, and `JOB=$(byteloom submit …)` would wait for it.
    """
    kept = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
