"""Train entry without a model, whose recipe says what each rank does; for tests of supervisors."""

import os
import signal
import sys
import time
from pathlib import Path

import yaml

from byteloom.core.faults import exit_code_of
from launchers.supervision.heartbeat import FOLDER, Heartbeat, folder_of
from launchers.supervision.slow_ranks import SlowRank, write_slow_ranks
from pretrain.terminal import console
from pretrain.terminal.console import say

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}


def start(recipe: Path) -> int:
    """Behave as the recipe says, which lists {rank: …, does: …, checkpoint: step} for each start.

    The last entry of the list also applies to all further starts. The rank acts once all ranks have arrived, and the
    other ranks wait for a signal. Ranks that work have a heartbeat each second, until the run folder has a file "done".
    A rank in `slow` reports that it is slow. With `deaf`, the other ranks do not hear signals, as in a collective.
    """
    tree = yaml.safe_load(recipe.read_text())
    requests: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: requests.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    number = int(os.environ.get(FOLDER, "-0").rpartition("-")[2])  # 0 in a terminal
    behavior = tree["starts"][min(number, len(tree["starts"]) - 1)]
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        print("GPUs", os.environ["CUDA_VISIBLE_DEVICES"])
    rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    if "checkpoint" in behavior and rank == 0:
        (Path(tree["run"]) / "checkpoints" / f"step-{behavior['checkpoint']:08d}").mkdir(parents=True, exist_ok=True)
    heartbeat = Heartbeat.of(os.environ, rank)
    if "slow" in behavior and rank == behavior["slow"]:
        write_slow_ranks(Path(tree["run"]), 100, [SlowRank(rank, heartbeat.node, 1.3)])
    wait_for_all_ranks(rank, requests)
    heartbeat.beat("step", behavior.get("checkpoint", 0))
    if behavior["does"] == "finish":
        return 0
    while behavior["does"] == "work" and not requests:
        time.sleep(0.2)
        heartbeat.beat("step", behavior.get("checkpoint", 0))
        if (Path(tree["run"]) / "done").exists():
            return 0
    if behavior.get("rank") == rank:
        does = {"die": die, "fail": fail, "freeze": freeze, "loop": loop_for_ever}
        if behavior["does"] == "fill":
            return console.run(lambda: fill_disk(Path(tree["run"]), heartbeat), exit_code_of)
        if behavior["does"] == "exit":
            return int(behavior["code"])
        if (code := does[behavior["does"]]()) is not None:
            return code
    while not requests or behavior.get("deaf"):
        time.sleep(0.05)
    return 128 + requests[0]


def wait_for_all_ranks(rank: int, requests: list[int]) -> None:
    """Wait until all ranks of this start have arrived, or a signal has come.

    Ranks that start late on a busy machine would otherwise look like ranks that hang.
    """
    folder = folder_of(os.environ)
    assert folder is not None
    (folder / f"arrived-{rank}").touch()
    size = int(os.environ.get("WORLD_SIZE") or os.environ["SLURM_STEP_NUM_TASKS"])
    while not requests and len(list(folder.glob("arrived-*"))) < size:
        time.sleep(0.02)


def die() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def fail() -> int:
    print("error: the disk is on fire", file=sys.stderr)
    return 1


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)  # the stack is asked for as the rank continues, and another thread may write it


def loop_for_ever() -> int:
    while True:
        time.sleep(0.1)


def fill_disk(run: Path, heartbeat: Heartbeat) -> int:
    """Fill the disk of a run; live on for longer than a step may take, then fail as a save would."""
    with (run / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1 << 10))
            except OSError as error:
                full = error
                break
    for _ in range(20):
        heartbeat.beat("step", 1)
        say("a message that the disk refuses")
        time.sleep(0.2)
    raise full
