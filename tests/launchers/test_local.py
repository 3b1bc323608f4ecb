"""Several ranks on this machine: real processes, the real command, real signals."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from byteloom.core.faults import DATA_EXIT_CODE
from launchers.processes import free_port
from pretrain.checkpoint import verify
from tests import commands
from tests.conftest import Run
from tests.end_to_end.runs.test_resume import STEPS, RunUnderTest

LOSSES = ("train/bits_per_byte", "validation/bits_per_byte")


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Return the process ids by rank. The kernel lists children in the order in which they were started."""
    return list(map(int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_and_wait(run: RunUnderTest, steps: int) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a run, wait until it has done some more steps, and return the launcher and its ranks."""
    first = run.last_step()
    launcher = run.start()
    while run.last_step() < max(first, 0) + steps:
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.01)
    return launcher, ranks_of(launcher)


def assert_trained_as_one_process(run: RunUnderTest, recipe: Path, folder: Path) -> None:
    """Check that a run has every step once, with the losses of one process."""
    alone = RunUnderTest(recipe, folder, "alone")
    alone.finish()
    assert [step for step, _ in run.numbers()] == list(range(STEPS + 1))
    for name in LOSSES:
        losses = [numbers[name] for _, numbers in run.numbers() if name in numbers]
        assert losses == pytest.approx([numbers[name] for _, numbers in alone.numbers() if name in numbers], rel=1e-5)


def test_three_ranks_resume_after_a_signal_or_a_kill_and_train_like_one_process(recipe: Path, tmp_path: Path):
    run = RunUnderTest(recipe, tmp_path, "three", "launch.processes=3")

    launcher, ranks = start_and_wait(run, steps=3)
    assert len(ranks) == 3
    os.kill(ranks[1], signal.SIGSTOP)  # a request also wakes a rank that was stopped
    launcher.send_signal(signal.SIGTERM)
    _, stderr = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGTERM, stderr
    assert f"SIGTERM: stopped after step {run.last_step()} of {STEPS}, with a checkpoint" in stderr
    assert "rank " not in stderr
    verify(run.folder / "checkpoints" / f"step-{run.last_step():08d}")
    assert not any(map(is_alive, ranks))

    launcher, ranks = start_and_wait(run, steps=3)
    os.kill(ranks[2], signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGKILL
    log = (run.folder / "train.rank-00002.log").relative_to(tmp_path)
    assert stderr.splitlines()[-1] == f"error: rank 2 of 3 was killed by SIGKILL; its log: {log}"
    assert "lost contact" not in stderr and "Traceback" not in stderr
    assert not any(map(is_alive, ranks))

    assert "resumes after step" in run.finish()
    assert_trained_as_one_process(run, recipe, tmp_path)


def test_ranks_do_not_outlive_a_killed_launcher(recipe: Path, tmp_path: Path):
    launcher = RunUnderTest(recipe, tmp_path, "orphans", "launch.processes=2").start()
    while len(ranks := ranks_of(launcher)) < 2:
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    while any(map(is_alive, ranks)):
        time.sleep(0.05)


def test_fault_common_to_all_ranks_is_reported_once(byteloom: Run, recipe: Path):
    done = byteloom("train", recipe, "launch.processes=2", "data.shards=nowhere", check=False)
    assert done.returncode == DATA_EXIT_CODE
    fault, last = done.stderr.splitlines()
    assert fault.startswith("error: ") and "nowhere" in fault
    assert last == "error: rank 0 of 2 ended with exit code 65; its log: runs/run/train.log"


def start_ranks(recipe: Path, size: int, overrides: list[list[str]], port: int) -> list[subprocess.Popen[str]]:
    """Start the first ranks of a world as another launcher would, each with its own overrides."""
    variables = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        commands.start(
            ["train", recipe, *own],
            {**commands.environment(), **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=recipe.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(overrides)
    ]


def refusals(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Return the one line with which each process refused, without the notice that it waits for other ranks."""
    stderr = [process.communicate(timeout=200)[1] for process in processes]
    stderr = [re.sub("^waiting for the other ranks: .*\n", "", text, flags=re.MULTILINE) for text in stderr]
    assert [process.returncode for process in processes] == [1] * len(processes), stderr
    assert all(len(text.splitlines()) == 1 for text in stderr), stderr
    return [text.strip() for text in stderr]


def test_rank_with_another_config_is_refused(recipe: Path):
    first, second = refusals(start_ranks(recipe, 2, [[], ["train.seed=5"]], free_port()))
    assert first == "error: rank 1 was started with another recipe than rank 0: train.seed: 0 -> 5"
    assert second == f"rank 1: {first}"
    assert not (recipe.parent / "runs").exists()


def test_missing_rank_is_named(recipe: Path):
    port = free_port()
    (stderr,) = refusals(start_ranks(recipe, 2, [["launch.meeting_seconds=1"]], port))
    assert stderr == f"error: rank 0 of 2 at 127.0.0.1:{port}: missing after 1 s: rank 1"


def test_port_in_use_is_refused_by_all_ranks(recipe: Path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        first, second = refusals(start_ranks(recipe, 2, [["launch.meeting_seconds=3"]] * 2, port))
    assert first == (
        f"error: rank 0 of 2 at 127.0.0.1:{port}: another process uses this port; choose another MASTER_PORT"
    )
    assert second.startswith(f"rank 1: error: rank 1 of 2 at 127.0.0.1:{port}: another program listens there")


def test_process_count_of_another_launcher_is_refused(recipe: Path):
    (stderr,) = refusals(start_ranks(recipe, 2, [["launch.processes=3"]], free_port()))
    assert (
        stderr
        == "error: launch.processes is 3, but another launcher has started 2 ranks already; set launch.processes=1"
    )


@pytest.mark.long
def test_torchrun_starts_the_same_entry_and_a_dead_rank_is_reported_in_one_line(recipe: Path, tmp_path: Path):
    run = RunUnderTest(recipe, tmp_path, "torchrun")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    run.launcher = torchrun
    assert f"finished at step {STEPS}" in run.finish()

    run = RunUnderTest(recipe, tmp_path, "by-hand", "train.steps=100000")
    first, second = start_ranks(recipe, 2, [list(map(str, run.arguments[2:]))] * 2, free_port())
    while run.last_step() < 1:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    _, stderr = second.communicate(timeout=120)
    first.communicate()
    assert second.returncode == 1
    (line,) = stderr.splitlines()
    assert line.startswith("rank 1: error: rank 1 of 2 lost contact with another rank: ")


@pytest.mark.long
def test_torchrun_restarts_the_ranks_of_a_killed_one_and_the_run_resumes(recipe: Path, tmp_path: Path):
    run = RunUnderTest(recipe, tmp_path, "elastic")
    elastic = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--no-python"]
    run.launcher = [sys.executable, "-m", "torch.distributed.run", *elastic]
    launcher, ranks = start_and_wait(run, steps=4)
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=250)
    assert launcher.returncode == 0, stderr
    assert_trained_as_one_process(run, recipe, tmp_path)
