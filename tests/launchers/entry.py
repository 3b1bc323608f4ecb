"""A train entry without a model, which does what its recipe says; for supervisors."""

import os
import signal
import sys
import time
from pathlib import Path

import yaml

from launchers.supervision.heartbeat import FOLDER, Heartbeat

ASKED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}


def start(recipe: Path) -> int:
    """Of each start in turn the recipe says {rank: …, does: …, checkpoint: step}; the last one holds for all further.

    The other ranks wait to be stopped or ended.
    """
    tree = yaml.safe_load(recipe.read_text())
    number = int(os.environ[FOLDER].rpartition("-")[2])
    wanted = tree["starts"][min(number, len(tree["starts"]) - 1)]
    print("GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"))
    rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    if "checkpoint" in wanted and rank == 0:
        (Path(tree["run"]) / "checkpoints" / f"step-{wanted['checkpoint']:08d}").mkdir(parents=True, exist_ok=True)
    Heartbeat.of(os.environ, rank).beat("step", wanted.get("checkpoint", 0))
    if wanted["does"] == "finish":
        return 0
    if wanted.get("rank") == rank:
        time.sleep(0.5)  # the others are there
        return {"die": die, "fail": fail, "freeze": freeze, "loop": loop_for_ever}[wanted["does"]]()
    return 128 + signal.sigwait(ASKED)


def die() -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def fail() -> int:
    print("error: the disk is on fire", file=sys.stderr)
    return 1


def freeze() -> int:
    os.kill(os.getpid(), signal.SIGSTOP)
    return 0


def loop_for_ever() -> int:
    while True:
        time.sleep(0.1)
