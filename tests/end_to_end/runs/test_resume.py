"""Killed and interrupted runs resume and equal the uninterrupted run bit for bit, with real processes and signals."""

import json
import platform
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.checkpoint import verify
from tests import commands
from tests.commands import BYTELOOM, CommandServer, environment
from tests.conftest import recipe_tree
from tests.distributed.parity import content

STEPS = 20
EXACT = ("train/bits_per_byte", "validation/bits_per_byte", "gradient_norm", "learning_rate", "epoch")


class RunUnderTest:
    """Run of STEPS steps that a test starts, signals and compares."""

    def __init__(self, recipe: Path, cwd: Path, name: str, *overrides: str) -> None:
        self.arguments = [
            "train", recipe, f"run.name={name}", f"train.steps={STEPS}", "checkpoint.every=3",
            "validation.every=10", *overrides,
        ]  # fmt: skip
        self.cwd = cwd
        self.folder = cwd / "runs" / name
        self.env: Mapping[str, str] = environment()
        self.server: CommandServer | None = None
        """Server of commands with this environment, or None for the server of all tests."""
        self.launcher: list[str] = []
        """Prefix of the command line, or empty to start the command directly."""

    def start(self) -> subprocess.Popen[str]:
        options: dict[str, Any] = {"env": self.env, "cwd": self.cwd, "stderr": subprocess.PIPE, "text": True}
        if self.launcher:
            return subprocess.Popen([*self.launcher, BYTELOOM, *self.arguments], **options)
        return commands.start(self.arguments, server=self.server, **options)

    def finish(self) -> str:
        process = self.start()
        _, output = process.communicate(timeout=250)
        assert process.returncode == 0, output
        return output

    def start_and_signal(self, number: signal.Signals, at_step: int) -> tuple[int, str]:
        """Send a signal as soon as the journal has a step; return the exit code and the output."""
        process = self.start()
        while process.poll() is None and self.last_step() < at_step:
            time.sleep(0.001)
        process.send_signal(number)
        _, output = process.communicate(timeout=120)
        return process.returncode, output

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def last_step(self) -> int:
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["step"]) if lines else -1
        except (FileNotFoundError, ValueError):  # missing, or read in the middle of a write
            return -1

    def numbers(self) -> list[tuple[int, dict[str, float]]]:
        return [(r["step"], {key: r[key] for key in EXACT if key in r}) for r in self.records()]

    def final_tensors(self) -> dict[str, bytes]:
        return content(self.folder / "checkpoints" / f"step-{STEPS:08d}")


def assert_same(run: RunUnderTest, reference: RunUnderTest) -> None:
    assert [step for step, _ in run.numbers()] == list(range(STEPS + 1))
    assert run.numbers() == reference.numbers()
    assert run.final_tensors() == reference.final_tensors()


def write_recipe(folder: Path, corpus_folder: Path) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_tree(corpus_folder)), encoding="utf-8")
    return recipe


@pytest.fixture(scope="module")
def reference(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunUnderTest:
    """Return an uninterrupted run in fp32, which tests only read."""
    folder = tmp_path_factory.mktemp("reference")
    run = RunUnderTest(write_recipe(folder, corpus_folder), folder, "reference")
    run.finish()
    return run


def test_run_killed_at_random_steps_resumes_bit_for_bit(recipe: Path, tmp_path: Path, reference: RunUnderTest):
    run = RunUnderTest(recipe, tmp_path, "killed")
    for low in (0, 9):
        code, _ = run.start_and_signal(signal.SIGKILL, random.randrange(low + 1, low + 5))
        assert code == -signal.SIGKILL
    assert "resumes after step" in run.finish()
    assert_same(run, reference)


def test_killed_run_in_bf16_with_two_threads_resumes_bit_for_bit(recipe: Path, tmp_path: Path):
    whole, killed = (RunUnderTest(recipe, tmp_path, name, "engine.precision=bf16") for name in ("whole", "killed"))
    # Spinning threads would slow down parallel tests. NumPy's would keep the server from forking.
    env = {**environment(), "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "OPENBLAS_NUM_THREADS": "1"}
    with commands.warm(env) as server:
        for run in (whole, killed):
            run.env, run.server = env, server
        whole.finish()
        killed.start_and_signal(signal.SIGKILL, random.randrange(1, 15))
        killed.finish()
    assert_same(killed, whole)


def test_interrupted_run_saves_and_resumes_bit_for_bit(recipe: Path, tmp_path: Path, reference: RunUnderTest):
    run = RunUnderTest(recipe, tmp_path, "interrupted")
    for number, step in ((signal.SIGINT, 5), (signal.SIGTERM, 12)):
        code, output = run.start_and_signal(number, step)
        assert code == 128 + number
        stopped_after = run.last_step()
        assert f"{number.name}: stopped after step {stopped_after} of {STEPS}, with a checkpoint" in output
        verify(run.folder / "checkpoints" / f"step-{stopped_after:08d}")
    run.finish()
    assert_same(run, reference)


def test_run_with_a_damaged_newest_checkpoint_resumes_from_the_previous_one(
    recipe: Path, tmp_path: Path, reference: RunUnderTest
):
    run = RunUnderTest(recipe, tmp_path, "damaged")
    shutil.copytree(reference.folder, run.folder)
    newest = run.folder / "checkpoints" / f"step-{STEPS:08d}"
    data = newest / "rank-00000.bin"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    output = run.finish()
    assert f"checkpoint {newest.name} is not valid" in output
    assert f"the checkpoint was moved to {newest.name}.invalid" in output
    assert_same(run, reference)


def test_finished_run_changes_nothing_and_resumes_with_more_steps(
    recipe: Path, tmp_path: Path, reference: RunUnderTest
):
    run = RunUnderTest(recipe, tmp_path, "run")
    shutil.copytree(reference.folder, run.folder)
    assert f"finished at step {STEPS}" in run.finish()
    assert run.records() == reference.records()
    output = RunUnderTest(recipe, tmp_path, "run", f"train.steps={STEPS + 5}").finish()
    assert f"changed since that checkpoint: train.steps: {STEPS} -> {STEPS + 5}" in output
    assert [r["step"] for r in run.records()] == list(range(STEPS + 6))


def test_only_one_process_trains_in_a_folder(recipe: Path, tmp_path: Path):
    run = RunUnderTest(recipe, tmp_path, "busy", "train.steps=100000")
    first = run.start()
    while run.last_step() < 1:
        assert first.poll() is None
        time.sleep(0.01)
    second = run.start()
    _, output = second.communicate(timeout=120)
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert f"process {first.pid} on {platform.node()} is training in" in output
