"""A run that is killed or interrupted and resumed equals the uninterrupted run, bit for bit.

Real processes, real signals.
"""

import json
import platform
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.checkpoint import verify
from tests import commands
from tests.commands import BYTELOOM, environment
from tests.conftest import recipe_tree
from tests.distributed.parity import content

STEPS = 40
EXACT = ("train/bits_per_byte", "validation/bits_per_byte", "gradient_norm", "learning_rate", "epoch")


class RunUnderTest:
    def __init__(self, recipe: Path, cwd: Path, name: str, *overrides: str) -> None:
        self.arguments = [
            "train", recipe, f"run.name={name}", f"train.steps={STEPS}", "checkpoint.every=6",
            "validation.every=20", *overrides,
        ]  # fmt: skip
        self.cwd = cwd
        self.folder = cwd / "runs" / name
        self.threads = "1"
        self.launcher: list[str] = []
        """Prefix of the command line; the test starts the command itself if it is None."""

    def start(self) -> subprocess.Popen[str]:
        env = {**environment(), "OMP_NUM_THREADS": self.threads}
        options: dict[str, Any] = {"env": env, "cwd": self.cwd, "stderr": subprocess.PIPE, "text": True}
        if self.launcher:
            return subprocess.Popen([*self.launcher, BYTELOOM, *self.arguments], **options)
        return commands.start(self.arguments, **options)

    def finish(self) -> str:
        process = self.start()
        _, said = process.communicate(timeout=250)
        assert process.returncode == 0, said
        return said

    def start_and_signal(self, number: signal.Signals, at_step: int) -> tuple[int, str]:
        """Send a signal as soon as the journal has a step; return the exit code and the output."""
        process = self.start()
        while process.poll() is None and self.last_step() < at_step:
            time.sleep(0.001)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def last_step(self) -> int:
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["step"]) if lines else -1
        except (FileNotFoundError, ValueError):  # not there yet, or caught in the middle of a line
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
    """The uninterrupted run in fp32, which tests compare with and do not change."""
    folder = tmp_path_factory.mktemp("reference")
    run = RunUnderTest(write_recipe(folder, corpus_folder), folder, "reference")
    run.finish()
    return run


def test_a_run_killed_at_random_steps_resumes_bit_for_bit(recipe: Path, tmp_path: Path, reference: RunUnderTest):
    run = RunUnderTest(recipe, tmp_path, "killed")
    for low in (0, 17):
        code, _ = run.start_and_signal(signal.SIGKILL, random.randrange(low + 1, low + 15))
        assert code == -signal.SIGKILL
    assert "resumes after step" in run.finish()
    assert_same(run, reference)


def test_a_killed_run_in_bf16_with_two_threads_resumes_bit_for_bit(recipe: Path, tmp_path: Path):
    whole, killed = (RunUnderTest(recipe, tmp_path, name, "engine.precision=bf16") for name in ("whole", "killed"))
    whole.threads = killed.threads = "2"
    whole.finish()
    killed.start_and_signal(signal.SIGKILL, random.randrange(1, 30))
    killed.finish()
    assert_same(killed, whole)


def test_an_interrupted_run_saves_and_resumes_bit_for_bit(recipe: Path, tmp_path: Path, reference: RunUnderTest):
    run = RunUnderTest(recipe, tmp_path, "interrupted")
    for number, step in ((signal.SIGINT, 9), (signal.SIGTERM, 22)):
        code, said = run.start_and_signal(number, step)
        assert code == 128 + number
        stopped_after = run.last_step()
        assert f"{number.name}: stopped after step {stopped_after} of {STEPS}, with a checkpoint" in said
        verify(run.folder / "checkpoints" / f"step-{stopped_after:08d}")
    run.finish()
    assert_same(run, reference)


def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_one_before(
    recipe: Path, tmp_path: Path, reference: RunUnderTest
):
    run = RunUnderTest(recipe, tmp_path, "damaged")
    shutil.copytree(reference.folder, run.folder)
    newest = run.folder / "checkpoints" / f"step-{STEPS:08d}"
    data = newest / "rank-00000.bin"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    said = run.finish()
    assert f"checkpoint {newest.name} is not valid" in said
    assert f"the checkpoint was moved to {newest.name}.invalid" in said
    assert_same(run, reference)


def test_a_finished_run_logs_that_it_is_finished_and_resumes_with_more_steps(
    recipe: Path, tmp_path: Path, reference: RunUnderTest
):
    run = RunUnderTest(recipe, tmp_path, "run")
    shutil.copytree(reference.folder, run.folder)
    assert f"finished at step {STEPS}" in run.finish()
    assert run.records() == reference.records()
    said = RunUnderTest(recipe, tmp_path, "run", f"train.steps={STEPS + 5}").finish()
    assert f"changed since that checkpoint: train.steps: {STEPS} -> {STEPS + 5}" in said
    assert [r["step"] for r in run.records()] == list(range(STEPS + 6))


def test_only_one_process_trains_in_a_folder(recipe: Path, tmp_path: Path):
    run = RunUnderTest(recipe, tmp_path, "busy", "train.steps=100000")
    first = run.start()
    while run.last_step() < 1:
        assert first.poll() is None
        time.sleep(0.01)
    second = run.start()
    _, said = second.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert f"process {first.pid} on {platform.node()} is training in" in said
