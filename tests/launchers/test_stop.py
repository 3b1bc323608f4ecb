"""Stop requests to any rank, repeated or not, in any phase."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launchers.supervision.heartbeat import read_beat
from pretrain.checkpoint import verify
from tests import commands
from tests.commands import BYTELOOM
from tests.end_to_end.runs.test_resume import STEPS, RunUnderTest
from tests.launchers.test_local import assert_trained_as_one_process, is_alive, start_and_wait

USR2_CODE = 128 + signal.SIGUSR2


def signal_one(ranks: list[int]) -> None:
    os.kill(ranks[1], signal.SIGUSR2)


def signal_all_many_times(ranks: list[int]) -> None:
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
        for rank in ranks:
            os.kill(rank, number)


def test_no_step_is_lost_when_one_rank_or_all_are_signalled_even_during_a_save(recipe: Path, tmp_path: Path):
    run = RunUnderTest(recipe, tmp_path, "two", "launch.processes=2", "checkpoint.every=1")
    for send in (signal_one, signal_all_many_times, signal_during_save(run)):
        launcher, ranks = start_and_wait(run, steps=2)
        send(ranks)
        _, stderr = launcher.communicate(timeout=120)
        assert launcher.returncode in (USR2_CODE, 128 + signal.SIGTERM), stderr
        assert f"stopped after step {run.last_step()} of {STEPS}, with a checkpoint" in stderr
        verify(run.folder / "checkpoints" / f"step-{run.last_step():08d}")
    run.finish()

    assert_trained_as_one_process(run, recipe, tmp_path)


def signal_during_save(run: RunUnderTest) -> Callable[[list[int]], None]:
    def send(ranks: list[int]) -> None:
        while not list((run.folder / "checkpoints").glob("*.partial")):
            assert any(map(is_alive, ranks)), "the run has ended before a save was seen"
            time.sleep(0.0005)
        os.kill(ranks[0], signal.SIGUSR2)

    return send


def test_supervised_rank_signalled_during_imports_stops_with_an_exit_code(recipe: Path, tmp_path: Path):
    """A rank blocks signals until it handles them, because a rank killed by a signal would count as failed."""
    beats = tmp_path / "beats"
    beats.mkdir()
    run = RunUnderTest(recipe, tmp_path, "early")
    run.folder.parent.mkdir()
    config = tmp_path / "config.yaml"
    shown = ["config", "show", *run.arguments[1:]]
    config.write_bytes(commands.run(shown, cwd=tmp_path, check=True, capture_output=True).stdout)
    rank = subprocess.Popen(
        [Path(BYTELOOM).with_name("python"), "-P", "-m", "launchers.rank", "pretrain.cli.train:start", config],
        cwd=tmp_path,
        env={**os.environ, "RANK": "0", "BYTELOOM_HEARTBEATS": str(beats), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(beats.glob("*.json")):
        assert rank.poll() is None
        time.sleep(0.01)
    rank.send_signal(signal.SIGUSR2)
    _, stderr = rank.communicate(timeout=120)
    assert rank.returncode == USR2_CODE, stderr
    assert stderr.splitlines()[-1] == "SIGUSR2: stopped before the first step; there was nothing to save"
    assert read_beat(beats, 0) is not None
