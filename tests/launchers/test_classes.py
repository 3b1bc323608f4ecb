"""Classes of failures: who is blamed, what counts as an attempt, and what is waited for."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from byteloom.core.faults import DATA_EXIT_CODE, STORAGE_EXIT_CODE, FaultClass, exit_code_of, is_of_storage
from byteloom.core.retries import RequestError, RetryPolicy
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError
from launchers.environment import clean_environment, replaced_environment
from launchers.slurm import calls
from launchers.slurm.allocation import ending_of_step, has_killed_rank, is_step
from launchers.slurm.calls import SchedulerError
from launchers.slurm.steps import steps_of
from launchers.supervision.causes import DEADLINES, fault_of_exit
from launchers.supervision.hangs import HangDetector
from launchers.supervision.heartbeat import Heartbeat
from launchers.supervision.plan import SuperviseConfig
from launchers.supervision.record import LaunchRecord
from tests.launchers.test_supervise import _put_tests_on_python_path, submission, wait_for  # noqa: F401 a fixture
from tests.launchers.test_terminal import state_of
from tests.slurm.cluster import children_of, wait_until
from tests.slurm.wrappers import fail_at_first

IMPATIENT = RetryPolicy(attempts=4, backoff_seconds=0.01, deadline_seconds=10.0)


def test_steps_are_found_whatever_the_names_of_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\nprintf '7.0 a person’s own step\\n7.1 start-0\\n7.2 \\n\\n7.3 check\\n'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert steps_of("7", is_step) == ["7.1", "7.3"]


@pytest.mark.parametrize(
    ("said", "kind", "fault", "node"),
    [
        ("srun: error: n2: task 3: Killed", "failed", "node", "n2"),
        ("srun: error: n2: tasks 2-3: Bus error (core dumped)", "failed", "node", "n2"),
        ("srun: error: Node failure on n2", "failed", "node", "n2"),
        ("srun: error: n2: task 3: Terminated", "stopped", "code", "n2"),
        ("srun: error: n2: task 3: User defined signal 2", "stopped", "code", "n2"),
        ("srun: error: n2: task 3: Exited with exit code 140", "stopped", "code", "n2"),
        ("srun: error: n2: task 3: Exited with exit code 1", "failed", "code", "n2"),
        ("srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 3: Exited with exit code 75",
         "failed", "storage", "n2"),
        ("srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 3: Exited with exit code 65",
         "failed", "data", "n2"),
        ("srun: error: Unable to create step for job 7: Socket timed out on send/recv operation",
         "failed", "scheduler", ""),
        ("srun: error: Unable to confirm allocation for job 7: Invalid job id specified\n"
         "srun: Check SLURM_JOB_ID environment variable. Expired or invalid job 7", "failed", "scheduler", ""),
        ("", "failed", "scheduler", ""),
        ("srun: Job step aborted: Waiting up to 4 seconds for job step to finish.\nsrun: error: n2: task 1: Killed",
         "failed", "scheduler", "n2"),
    ],
)  # fmt: skip
def test_words_of_srun_have_a_class(said: str, kind: str, fault: str, node: str, tmp_path: Path):
    ending = ending_of_step(f"srun: launching\n{said}\n", tmp_path)
    assert (ending.kind, ending.node) == (kind, node)
    assert kind == "stopped" or ending.fault == fault
    assert has_killed_rank(said) == (kind == "failed" and ": task" in said and "Exited" not in said)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS])
def test_disk_that_is_full_or_fails_is_a_fault_of_storage(number: int):
    error = RuntimeError("cannot write a checkpoint")
    error.__cause__ = OSError(number, os.strerror(number), "runs/x")
    assert is_of_storage(error)
    assert fault_of_exit(1, f"error: rank 1 of 2: {error.__cause__}") == "storage"


def test_server_that_is_down_is_a_fault_of_storage_and_an_error_of_the_code_is_not():
    refused = OSError("EndpointConnectionError: Could not connect")
    refused.__cause__ = ConnectionError("refused")
    for error in (refused, RequestError(FaultClass.PASSING, "503 (attempt 10 of 10)", TimeoutError())):
        assert is_of_storage(error)
    for error in (ValueError("shape"), FileNotFoundError(errno.ENOENT, "x"), PermissionError(errno.EACCES, "x")):
        assert not is_of_storage(error)
    assert fault_of_exit(STORAGE_EXIT_CODE, "") == "storage"
    assert fault_of_exit(1, "rank 1: error: rank 1 of 2 lost contact with another rank: Connection reset by peer") == (
        "code"
    )


def test_corpus_that_is_damaged_is_a_fault_of_the_data_and_a_wrong_recipe_is_not(corpus_folder: Path, tmp_path: Path):
    shutil.copytree(corpus_folder / "train", tmp_path / "corpus")
    [shard, *_] = sorted((tmp_path / "corpus").glob("*.tar"))
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(CorpusError, match=r"cannot be read: No such file") as missing:
        Corpus(tmp_path / "corpus")
    (tmp_path / "elsewhere").rename(shard)
    with pytest.raises(CorpusError, match=r"is asked for") as changed:
        Corpus(tmp_path / "corpus", digest="0")
    (tmp_path / "corpus/index.npy").write_bytes(b"damage")
    with pytest.raises(CorpusError, match=r"is damaged") as damaged:
        Corpus(tmp_path / "corpus")
    assert {exit_code_of(caught.value) for caught in (missing, changed, damaged)} == {DATA_EXIT_CODE}
    assert exit_code_of(CorpusError("the corpus is shorter than one sequence")) == 1
    assert fault_of_exit(DATA_EXIT_CODE, "error: rank 1 of 2: shard-00000.tar cannot be read") == "data"


def test_sign_of_life_never_raises(tmp_path: Path):
    (tmp_path / "file").touch()
    heartbeat = Heartbeat(tmp_path / "file", 0)
    heartbeat.beat("step", 1)
    heartbeat.end(0)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of commands, first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_call_of_slurm_is_repeated_while_its_fault_passes(commands: Path):
    left = fail_at_first(commands, "scontrol", 3, "slurm_load_jobs error: Socket timed out", real="/bin/echo")
    assert calls.ask("scontrol", "show", policy=IMPATIENT).stdout == "show\n"
    left.write_text("9\n")
    with pytest.raises(SchedulerError, match=r"^Slurm does not answer: .*Socket timed out \(attempt 4 of 4\)"):
        calls.ask("scontrol", "show", policy=IMPATIENT)
    assert left.read_text() == "5\n"


def test_final_answer_of_slurm_is_not_repeated(commands: Path):
    left = fail_at_first(commands, "scontrol", 3, "slurm_load_jobs error: Invalid job id specified")
    assert calls.ask("scontrol", policy=IMPATIENT).returncode == 1
    assert left.read_text() == "2\n"
    with pytest.raises(SchedulerError, match=r"^this machine has no sdancer: Slurm is not installed"):
        calls.ask("sdancer", policy=IMPATIENT)


def test_calls_of_slurm_get_nothing_of_the_shell_that_changes_them(monkeypatch: pytest.MonkeyPatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SBATCH_EXPORT", "SQUEUE_FORMAT", "PMIX_RANK", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    with replaced_environment(clean_environment()):
        printed = subprocess.run(["env"], capture_output=True, text=True, check=True).stdout
    assert [line for line in printed.splitlines() if line.endswith("=x")] == ["SLURM_CONF=x"]
    assert os.environ["SLURM_JOB_ID"] == "x"


@pytest.mark.long
@pytest.mark.parametrize(("fault", "code"), [("storage", STORAGE_EXIT_CODE), ("data", DATA_EXIT_CODE)])
def test_storage_or_data_that_fail_use_up_no_attempt(tmp_path: Path, fault: str, code: int):
    run = tmp_path / "run"
    failing = {"rank": 1, "does": "exit", "code": code}
    limits = SuperviseConfig(attempts=1, pause_seconds=0.1)
    submission(run, [failing, failing, {"does": "finish"}], limits).submit()
    launches = wait_for(run, "finished")
    assert [(launch.event, launch.fault, launch.faulty) for launch in launches[1:]] == [
        *(("started", "", ""), ("failed", fault, "")) * 2, ("started", "", ""), ("finished", "", ""),
    ]  # fmt: skip


@pytest.mark.long
def test_request_to_stop_ends_a_pause(tmp_path: Path):
    run = tmp_path / "run"
    job = int(submission(run, [{"rank": 1, "does": "exit", "code": STORAGE_EXIT_CODE}]).submit())
    wait_for(run, "failed")
    os.kill(job, signal.SIGTERM)
    assert wait_for(run, "stopped")[-1].reason == "asked by hand"
    os.waitpid(job, 0)


@pytest.mark.slow
def test_data_that_fail_for_longer_than_their_deadline_end_the_run(tmp_path: Path):
    """During the pause, the failure is moved to before the deadline."""
    run = tmp_path / "run"
    limits = SuperviseConfig(pause_seconds=5)
    submission(run, [{"rank": 1, "does": "exit", "code": DATA_EXIT_CODE}], limits).submit()
    record = LaunchRecord(run)
    failed = next(launch for launch in wait_for(run, "failed") if launch.event == "failed")
    earlier = [replace(launch, time=launch.time - DEADLINES["data"]) for launch in record.read()]
    record.path.write_text("".join(f"{json.dumps(asdict(launch))}\n" for launch in earlier))
    assert failed.fault == "data"
    launches = wait_for(run, "gave_up")
    assert re.match(r"the data could not be read \d+ times in a row: rank 1: exit code 65", launches[-1].reason)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of a few megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_full_disk_kills_no_rank_and_the_supervisor_waits_for_space(small_disk: Path):
    run = small_disk / "run"
    limits = SuperviseConfig(attempts=1, step_seconds=1.5, pause_seconds=600)  # none once the supervisor can write
    job = submission(run, [{"rank": 1, "does": "fill"}, {"does": "finish"}], limits).submit()
    filler = run / "filler"
    wait_until(lambda: filler.exists() and not os.statvfs(small_disk).f_bavail, "the disk is full", 60)
    [supervisor] = children_of(int(job))
    wait_until(lambda: not children_of(supervisor), "the ranks have ended", 60)
    time.sleep(1)  # the supervisor cannot note it
    filler.unlink()
    launches = wait_for(run, "finished")
    assert [(launch.event, launch.fault, launch.faulty) for launch in launches[1:]] == [
        ("started", "", ""), ("failed", "storage", ""), ("started", "", ""), ("finished", "", ""),
    ]  # fmt: skip


@pytest.mark.slow
def test_clocks_start_again_when_the_watcher_was_stopped_too(tmp_path: Path):
    detector = HangDetector(tmp_path, 1, SuperviseConfig(step_seconds=0.1), lambda: None)
    Heartbeat(tmp_path, 0).beat("step", 1)
    assert not detector.has_hung()
    time.sleep(0.5)  # as if this process had been stopped: it looks more often
    assert not detector.has_hung()


@pytest.mark.long
def test_suspended_run_has_not_hung(tmp_path: Path):
    run = tmp_path / "run"
    job = int(submission(run, [{"does": "work"}], SuperviseConfig(step_seconds=3.0)).submit())
    beats = run / "jobs/001/heartbeats/start-0"
    wait_until(lambda: len(list(beats.glob("rank-*.json"))) == 2, "both ranks", 60)
    processes = [job, *children_of(job)]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    wait_until(lambda: all(state_of(process) == "T" for process in processes), "all are stopped", 10)
    time.sleep(6)  # longer than a step may take, and than the supervisor's own pauses
    for process in processes:
        os.kill(process, signal.SIGCONT)
    time.sleep(1)
    (run / "done").touch()
    assert [launch.event for launch in wait_for(run, "finished")] == ["submitted", "started", "finished"]
    assert "this process was stopped for " in (next((run / "jobs/001/submitit").glob("*_log.err"))).read_text()
