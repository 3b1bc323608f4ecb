"""Ranks of a terminal that stop answering, and requests to stop them: real processes without a model."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.stop_requests import StopRequests
from tests.launchers.test_local import is_alive, ranks_of
from tests.slurm.cluster import wait_until

ROOT = Path(__file__).parents[2]


def start(folder: Path, behavior: dict[str, Any], step_seconds: float) -> subprocess.Popen[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"run": str(folder), "starts": [behavior]}))
    command = [sys.executable, "-m", "tests.launchers.terminal", recipe, str(step_seconds)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_state(launcher: subprocess.Popen[str], folder: Path, states: str) -> list[int]:
    """Wait until both ranks have a heartbeat in a step and the second is in one of the states; return the ranks."""

    def found() -> list[int]:
        assert launcher.poll() is None
        beats = [path.read_text() for path in folder.glob("byteloom-heartbeats-*/rank-*.json")]
        ranks = ranks_of(launcher)
        if (
            [beat for beat in beats if '"step", ' in beat] != beats
            or len(beats) < 2
            or state_of(ranks[1]) not in states
        ):
            return []
        return ranks

    return wait_until(found, f"rank 1 is in a state of {states}", 60)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_rank_that_is_stopped_is_named_and_the_run_ends_with_all_stacks(tmp_path: Path):
    # The notice comes after half of the limit. The last heartbeats may be seen in two looks, a second apart.
    launcher = start(tmp_path, {"rank": 1, "does": "freeze", "checkpoint": 5}, step_seconds=4)
    _, stderr = launcher.communicate(timeout=60)
    notice, end = stderr.splitlines()
    assert launcher.returncode == 1
    assert re.fullmatch(r"warning: no step for [234] s, waiting for rank 1, which does not answer", notice)
    said = re.fullmatch(r"ERROR rank 1 on \S+ hangs in phase step after step 5: (.*) in (\S+)", end)
    assert said is not None
    assert re.search(r"\(limit: supervise.step_seconds\) and does not answer; all ranks are ended, and", said[1])
    first, second = Path(said[2]).read_text().split("rank 1:")
    assert "in start" in first and "in freeze" in second


@pytest.mark.slow
def test_one_request_stops_a_run_whose_rank_is_stopped(tmp_path: Path):
    launcher = start(tmp_path, {"rank": 1, "does": "freeze"}, step_seconds=300)
    ranks = wait_for_state(launcher, tmp_path, "T")
    launcher.terminate()
    assert launcher.communicate(timeout=60)[1] == ""
    assert launcher.returncode == 128 + signal.SIGTERM
    assert not any(map(is_alive, ranks))


@pytest.mark.slow
def test_request_that_is_repeated_ends_deaf_ranks_at_once_and_says_so(tmp_path: Path):
    launcher = start(tmp_path, {"rank": 1, "does": "loop"}, step_seconds=300)
    ranks = wait_for_state(launcher, tmp_path, "S")
    launcher.terminate()
    wait_until(lambda: not is_alive(ranks[0]), "the rank that listens has stopped", 60)
    time.sleep(1.1)  # signals within a second are one request
    launcher.terminate()
    assert launcher.communicate(timeout=60)[1] == (
        "WARNING SIGTERM again: all ranks are ended at once, without a checkpoint\n"
    )
    assert launcher.returncode == 128 + signal.SIGTERM
    assert not any(map(is_alive, ranks))


@pytest.mark.parametrize(
    ("signals", "is_urgent", "reminds"),
    [
        ([("INT", 0.0), ("INT", 0.1)], True, False),  # a person presses Ctrl-C twice
        ([("TERM", 0.0), ("TERM", 3.0)], True, False),
        ([("USR2", 0.0), ("TERM", 0.0), ("TERM", 0.2)], False, False),  # Slurm preempts a job
        ([("TERM", 0.0), ("TERM", 120.0)], False, True),  # Slurm's reminder before it kills
        ([("TERM", 0.0), ("TERM", 120.0), ("TERM", 122.0)], True, True),
    ],
)
def test_requests_count_by_their_distance(signals: list[tuple[str, float]], is_urgent: bool, reminds: bool):
    requests = StopRequests()
    for name, now in signals:
        requests.note(signal.Signals[f"SIG{name}"], now)
    assert requests.first == signal.Signals[f"SIG{signals[0][0]}"]
    assert (requests.is_urgent, requests.take_reminder() is not None) == (is_urgent, reminds)
    assert requests.take_reminder() is None
