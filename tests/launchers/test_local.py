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

from launchers.processes import free_port
from pretrain.checkpoint import verify
from tests import commands
from tests.conftest import Run
from tests.end_to_end.test_resume import STEPS, RunUnderTest

LOSSES = ("train/bits_per_byte", "validation/bits_per_byte")


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids, by rank: in the order in which they were started."""
    return sorted(map(int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()))


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_and_wait(run: RunUnderTest, steps: int) -> tuple[subprocess.Popen[str], list[int]]:
    """The launcher and its ranks, once they have done so many more steps."""
    first = run.last_step()
    launcher = run.start()
    while run.last_step() < max(first, 0) + steps:
        assert launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.01)
    return launcher, ranks_of(launcher)


def assert_trained_as_one_process(run: RunUnderTest, recipe: Path, folder: Path) -> None:
    """It has every step once, with the losses of one process."""
    alone = RunUnderTest(recipe, folder, "alone")
    alone.finish()
    assert [step for step, _ in run.numbers()] == list(range(STEPS + 1))
    for name in LOSSES:
        told = [numbers[name] for _, numbers in run.numbers() if name in numbers]
        assert told == pytest.approx([numbers[name] for _, numbers in alone.numbers() if name in numbers], rel=1e-5)


def test_whatever_ends_them_three_ranks_go_on_and_train_as_one_process_does(recipe: Path, tmp_path: Path):
    run = RunUnderTest(recipe, tmp_path, "three", "launch.processes=3")

    launcher, ranks = start_and_wait(run, steps=3)
    assert len(ranks) == 3
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGTERM, said
    assert f"SIGTERM: stopped after step {run.last_step()} of {STEPS}, with a checkpoint" in said
    assert "rank " not in said
    verify(run.folder / "checkpoints" / f"step-{run.last_step():08d}")
    assert not any(map(lives, ranks))

    launcher, ranks = start_and_wait(run, steps=3)
    os.kill(ranks[2], signal.SIGKILL)
    _, said = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGKILL
    log = (run.folder / "train.rank-00002.log").relative_to(tmp_path)
    assert said.splitlines()[-1] == f"error: rank 2 of 3 was killed by SIGKILL; its log: {log}"
    assert "lost contact" not in said and "Traceback" not in said
    assert not any(map(lives, ranks))

    assert "resumes after step" in run.finish()
    assert_trained_as_one_process(run, recipe, tmp_path)


def test_ranks_do_not_outlive_a_killed_launcher(recipe: Path, tmp_path: Path):
    launcher = RunUnderTest(recipe, tmp_path, "orphans", "launch.processes=2").start()
    while len(ranks := ranks_of(launcher)) < 2:
        assert launcher.poll() is None
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    while any(map(lives, ranks)):
        time.sleep(0.05)


def test_what_is_wrong_for_all_is_said_once(byteloom: Run, recipe: Path):
    done = byteloom("train", recipe, "launch.processes=2", "data.shards=nowhere", check=False)
    assert done.returncode == 1
    fault, end = done.stderr.splitlines()
    assert fault.startswith("error: ") and "nowhere" in fault
    assert end == "error: rank 0 of 2 ended with exit code 1; its log: runs/run/train.log"


def by_hand(recipe: Path, size: int, overrides: list[list[str]], port: int) -> list[subprocess.Popen[str]]:
    """The first ranks of so many, each with overrides of its own, as a launcher of another kind starts them."""
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        commands.start(
            ["train", recipe, *own],
            {**commands.environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=recipe.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(overrides)
    ]


def refusals(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each said, in one line, when it refused; on a slow machine it has said that it waits for the others."""
    said = [process.communicate(timeout=200)[1] for process in processes]
    said = [re.sub("^waiting for the other ranks: .*\n", "", text, flags=re.MULTILINE) for text in said]
    assert [process.returncode for process in processes] == [1] * len(processes), said
    assert all(len(text.splitlines()) == 1 for text in said), said
    return [text.strip() for text in said]


def test_a_rank_with_another_config_is_refused(recipe: Path):
    first, second = refusals(by_hand(recipe, 2, [[], ["train.seed=5"]], free_port()))
    assert first == "error: rank 1 was started with another recipe than rank 0: train.seed: 0 -> 5"
    assert second == f"rank 1: {first}"
    assert not (recipe.parent / "runs").exists()


def test_a_rank_that_never_comes_is_named(recipe: Path):
    port = free_port()
    (said,) = refusals(by_hand(recipe, 2, [["launch.meeting_seconds=1"]], port))
    assert said == f"error: rank 0 of 2 at 127.0.0.1:{port}: missing after 1 s: rank 1"


def test_a_port_in_use_is_refused_by_all_ranks(recipe: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        first, second = refusals(by_hand(recipe, 2, [[], []], port))
    assert first == (
        f"error: rank 0 of 2 at 127.0.0.1:{port}: another process uses this port; choose another MASTER_PORT"
    )
    assert second.startswith(f"rank 1: error: rank 1 of 2 at 127.0.0.1:{port}: another program listens there")


def test_two_launchers_that_disagree_are_refused(recipe: Path):
    (said,) = refusals(by_hand(recipe, 2, [["launch.processes=3"]], free_port()))
    assert (
        said == "error: launch.processes is 3, but another launcher has started 2 ranks already; set launch.processes=1"
    )


@pytest.mark.long
def test_torchrun_starts_the_same_entry_and_a_dead_rank_is_told_in_a_line(recipe: Path, tmp_path: Path):
    run = RunUnderTest(recipe, tmp_path, "torchrun")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    run.launcher = torchrun
    assert f"finished at step {STEPS}" in run.finish()

    run = RunUnderTest(recipe, tmp_path, "by-hand", "train.steps=100000")
    first, second = by_hand(recipe, 2, [list(map(str, run.arguments[2:]))] * 2, free_port())
    while run.last_step() < 1:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    _, said = second.communicate(timeout=60)
    first.communicate()
    assert second.returncode == 1
    (line,) = said.splitlines()
    assert line.startswith("rank 1: error: rank 1 of 2 lost contact with another rank: ")
