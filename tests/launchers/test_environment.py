"""Environments of submissions, times as Slurm writes them, and two submissions at once."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.pool import Pool
from pathlib import Path

import pytest

from launchers.environment import OF_A_PERSON, clean_environment
from launchers.slurm.presets import ClusterConfig, ClusterError, load_cluster
from launchers.slurm.times import seconds_of
from launchers.submission import Submission
from launchers.supervision.plan import SuperviseConfig
from launchers.supervision.record import LaunchRecord, submissions_of
from tests.launchers.plans import modelless_plan

ROOT = Path(__file__).parents[2]
OF_ANOTHER_JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_ARRAY_JOB_ID": "7",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_MEM_PER_CPU": "999999",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_CPU_BIND": "verbose,mask_cpu:0x1",
    "SBATCH_EXPORT": "NONE",
    "SRUN_CPUS_PER_TASK": "64",
    "PMIX_RANK": "5",
    "OMPI_COMM_WORLD_RANK": "5",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "CUDA_VISIBLE_DEVICES": "3",
}


def test_clean_environment_keeps_what_a_person_set():
    kept = {"PATH": "/bin", "HF_HOME": "/x", "OMP_NUM_THREADS": "2", **dict.fromkeys(OF_A_PERSON, "y")}
    assert clean_environment({**OF_ANOTHER_JOB, **kept}) == kept
    assert clean_environment({"CUDA_VISIBLE_DEVICES": "1"}) == {"CUDA_VISIBLE_DEVICES": "1"}  # outside of a job


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("12:30", 750), ("12:00:00", 43_200), ("2-00", 172_800), ("1-02:03", 93_780), ("1-00:00:01", 86_401),
     ("UNLIMITED", math.inf)],
)  # fmt: skip
def test_times_of_slurm(text: str, seconds: float):
    assert seconds_of(text) == seconds


def test_signal_must_come_after_the_start():
    with pytest.raises(ClusterError, match=r"signal_seconds of .*cpu.yaml is 600, but the job ends after 300 s"):
        load_cluster("cpu", {"time": "5", "signal_seconds": 600})


def submission(run: Path) -> Submission:
    cluster = ClusterConfig(scheduler="local")
    return Submission(run, "run: x\n", modelless_plan(run, cluster, SuperviseConfig()), cluster)


def submitted_by_hand(run: Path) -> str:
    """Do what a submission does, with this process as its job; return the error, if there is one."""
    own = submission(run)
    try:
        with own.written():
            own.note(str(multiprocessing.current_process().pid))
    except ClusterError as error:
        return str(error)
    return ""


def test_one_of_several_submissions_at_once_wins_and_keeps_its_files(tmp_path: Path):
    run = tmp_path / "run"
    with Pool(4, context=multiprocessing.get_context("fork")) as pool:  # type: ignore[call-arg]
        errors = pool.map(submitted_by_hand, [run] * 4, chunksize=1)
        assert sorted(bool(error) for error in errors) == [False, True, True, True]
    assert all("has the job" in error for error in errors if error)
    [only] = submissions_of(run).values()
    assert (only / "plan.json").exists() and (only / "code/launchers").is_dir()
    assert [launch.event for launch in LaunchRecord(run).read()] == ["submitted"]


def test_failed_submission_removes_what_it_made_and_nothing_else(tmp_path: Path):
    run = tmp_path / "run"
    first, second = submission(run), submission(run)
    with pytest.raises(KeyboardInterrupt), first.written():
        assert (first.folder / "plan.json").exists()
        raise KeyboardInterrupt
    assert not first.folder.exists()
    with second.written():
        pass
    with pytest.raises(KeyboardInterrupt), first.written():
        raise KeyboardInterrupt
    assert second.folder.exists() and list(submissions_of(run)) == [1]


@pytest.mark.parametrize(("text", "gpus"), [(8, 8), ("8", 8), ("h100:4", 4), (0, 0)])
def test_gpus_may_have_a_type(tmp_path: Path, text: str | int, gpus: int):
    (tmp_path / "mine.yaml").write_text(f"gpus_per_node: {text}\n")
    assert load_cluster(str(tmp_path / "mine.yaml"), {}).gpus == gpus
    with pytest.raises(ClusterError, match='gpus_per_node is "h100"'):
        load_cluster("gpu", {"gpus_per_node": "h100"})


def test_process_started_in_silence_does_not_hold_a_pipe_open():
    script = (
        "import subprocess\n"
        "from launchers.environment import silenced_streams\n"
        "with silenced_streams():\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "print(child.pid)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=30, check=True
    )
    os.kill(int(done.stdout), signal.SIGKILL)
