"""A stop request works in every phase of the real command, and the next start resumes from there."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from launchers.supervision.heartbeat import FOLDER, beat_of, read_beat
from pretrain.checkpoint import read_metadata, verify
from tests import commands
from tests.commands import environment
from tests.conftest import LARGE_DOCUMENT, STDLIB, prepare_corpus, recipe_tree
from tests.launchers.test_local import ranks_of
from tests.mlflow_server import make_store
from tests.s3 import StallingProxy, s3_server, stalling_proxy

LIMIT = 120.0
"""Seconds that a test waits for an event, on a busy machine."""
BEFORE_THE_FIRST_STEP = "stopped before the first step; there was nothing to save"
BUCKET = "checkpoints"
EXACT = ("train/bits_per_byte", "validation/bits_per_byte", "gradient_norm", "learning_rate", "epoch")


class Command:
    """Running command with its output in a file.

    Args:
        is_cold: start the real command and not a fork.
    """

    running: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, folder: Path, *arguments: object, beats: Path | None = None, is_cold: bool = False) -> None:
        self.output_path = folder / f"output-{len(list(folder.glob('output-*')))}"
        env = {**environment(), **({FOLDER: str(beats)} if beats else {})}
        start = commands.start_cold if is_cold else commands.start
        with self.output_path.open("wb") as file:
            self.process = start(arguments, env, cwd=folder, stdout=subprocess.DEVNULL, stderr=file)
        self.running.append(self.process)

    @property
    def output(self) -> str:
        return self.output_path.read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.005)

    def wait_for(self, text: str) -> None:
        self.wait_until(lambda: text in self.output)

    def stop(self, number: signal.Signals = signal.SIGTERM, process: int | None = None) -> str:
        """Send a signal, wait for the end with that signal's exit code, and return the output."""
        os.kill(process or self.process.pid, number)
        return self.end(128 + number)

    def end(self, code: int = 0) -> str:
        assert self.process.wait(LIMIT) == code, self.output
        assert "Traceback" not in self.output
        return self.output


def wait_for_validation(command: Command, beats: Path, step: int, rank: int = 0) -> None:
    """Wait until the heartbeat of a rank reports the validation after a step."""

    def is_validating() -> bool:
        beat = read_beat(beats, rank) if beat_of(beats, rank).exists() else None
        return beat is not None and (beat.phase, beat.step) == ("evaluation", step)

    command.wait_until(is_validating)


@pytest.fixture(autouse=True)
def _kill_running_commands() -> Iterator[None]:
    yield
    for process in Command.running:
        process.kill()
    Command.running.clear()


@pytest.fixture
def large(tmp_path: Path, corpus_folder: Path) -> Path:
    """Return a recipe whose micro-batch and whose validation take seconds, or half a minute on a slow machine."""
    tree: Any = recipe_tree(corpus_folder)
    tree["model"] = {"family": "transformer", "sequence_length": 512, "width": 512, "layers": 2, "heads": 8}
    tree["train"] = {"steps": 2, "global_batch": 64, "micro_batch": 64}
    tree["optimizer"] = {"schedule": {"warmup_steps": 0}}
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.long)])
def test_run_stops_at_once_during_rehearsal_and_first_validation(large: Path, tmp_path: Path, compiles: bool):
    """The main thread is inside one long call of torch when the signal arrives."""
    folder = tmp_path / "runs/run"
    compiling = ("engine.compile=true",) if compiles else ()

    rehearsing = Command(tmp_path, "train", large, *compiling)
    rehearsing.wait_for("rehearsing a micro-batch")
    assert re.match(r"training runs/run: transformer, [\d,]+ parameters, fp32 on cpu, one process\n", rehearsing.output)
    assert rehearsing.stop().splitlines()[-1] == f"SIGTERM: {BEFORE_THE_FIRST_STEP}"

    small = ("train.micro_batch=1", "train.global_batch=1", "train.steps=1")
    make_store(tmp_path / "runs/mlflow.db")
    (tmp_path / "beats").mkdir()
    validating = Command(tmp_path, "train", large, *small, "tracking.enabled=true", beats=tmp_path / "beats")
    wait_for_validation(validating, tmp_path / "beats", step=0)
    assert f"SIGUSR2: {BEFORE_THE_FIRST_STEP}" in validating.stop(signal.SIGUSR2)
    assert json.loads((folder / "mlflow.json").read_text())["status"] == "KILLED"
    assert not (folder / "checkpoints").exists()
    assert "SIGUSR2: stopped before" in (folder / "train.log").read_text()

    assert "finished at step 1" in Command(tmp_path, "train", large, *small, "validation.shards=null").end()


def numbers_of(folder: Path) -> list[tuple[int, dict[str, float]]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], {name: record[name] for name in EXACT if name in record}) for record in records]


def newest_step(folder: Path) -> int:
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    verify(checkpoint)
    return int(read_metadata(checkpoint).state["reading"]["step"])


class ValidatedRuns:
    """Runs of eight steps with a validation every four, and an uninterrupted reference run."""

    def __init__(self, folder: Path, corpus_folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        tree: Any = recipe_tree(corpus_folder)
        prepare_corpus([STDLIB / "email" / LARGE_DOCUMENT], folder / "large")  # long enough to stop a run meanwhile
        tree["validation"]["shards"] = str(folder / "large")
        self.recipe.write_text(yaml.safe_dump(tree))
        self.start("reference").end()

    def start(self, name: str, *overrides: str) -> Command:
        self.beats = self.folder / f"beats-{name}"
        self.beats.mkdir(exist_ok=True)
        for path in self.beats.iterdir():
            path.unlink()
        steps = ("train.steps=8", "validation.every=4")
        return Command(self.folder, "train", self.recipe, f"run.name={name}", *steps, *overrides, beats=self.beats)

    def wait_for_validation(self, command: Command, step: int, rank: int = 0) -> None:
        """Wait until the heartbeat of a rank reports the validation after a step."""
        wait_for_validation(command, self.beats, step, rank)

    def runs(self, name: str) -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def validated(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ValidatedRuns:
    return ValidatedRuns(tmp_path_factory.mktemp("validated"), corpus_folder)


def test_next_start_repeats_an_interrupted_validation_and_all_metrics_are_the_same(validated: ValidatedRuns):
    folder = validated.runs("cut")
    for step in (4, 8):
        start = validated.start("cut")
        validated.wait_for_validation(start, step)
        assert f"SIGTERM: stopped after step {step} of 8, with a checkpoint" in start.stop()
        assert newest_step(folder) == step
        assert numbers_of(folder)[-1][0] == step - 1
    for _ in range(2):  # another start of the finished run changes nothing
        assert "finished at step 8" in validated.start("cut").end()
        assert numbers_of(folder) == numbers_of(validated.runs("reference"))


def test_ranks_agree_to_stop_in_a_validation_and_a_signal_to_one_rank_ends_a_run_without_steps(
    validated: ValidatedRuns,
):
    folder, two = validated.runs("two"), ("launch.processes=2", "engine.name=fsdp")

    first = validated.start("two", *two)
    validated.wait_for_validation(first, 0, rank=1)
    first.stop(signal.SIGUSR2, ranks_of(first.process)[1])
    assert not (folder / "checkpoints").exists()

    second = validated.start("two", *two)
    validated.wait_for_validation(second, 4, rank=1)
    assert "SIGUSR2: stopped after step 4 of 8" in second.stop(signal.SIGUSR2, ranks_of(second.process)[1])
    assert newest_step(folder) == 4
    assert numbers_of(folder)[-1][0] == 3

    validated.start("two", *two).end()
    expected = numbers_of(validated.runs("reference"))
    for (step, numbers), (expected_step, expected_numbers) in zip(numbers_of(folder), expected, strict=True):
        assert step == expected_step
        assert numbers == pytest.approx(expected_numbers, rel=1e-4)


@pytest.fixture
def proxy() -> Iterator[StallingProxy]:
    with s3_server(BUCKET), stalling_proxy() as proxy:
        yield proxy


def test_stop_works_while_a_checkpoint_is_loaded_verified_or_saved(proxy: StallingProxy, recipe: Path, tmp_path: Path):
    home = f"s3://{BUCKET}/runs"
    train = ("train", recipe, f"checkpoint.home={home}", "validation.shards=null", "optimizer.schedule.warmup_steps=0")
    Command(tmp_path, *train, "train.steps=2").end()

    proxy.waits_for = b"rank-00000.bin"
    loading = Command(tmp_path, *train, "train.steps=3")
    loading.wait_for("loading the checkpoint: ")
    assert loading.stop().splitlines()[-1] == f"SIGTERM: {BEFORE_THE_FIRST_STEP}"

    verifying = Command(tmp_path, "eval", f"{home}/run")
    verifying.wait_for("verifying the checkpoint: ")
    assert verifying.stop(signal.SIGINT).splitlines()[-1] == "SIGINT: stopped"

    def saving() -> Command:
        proxy.waits_for = None
        command = Command(tmp_path, *train, "train.steps=3")
        command.wait_for("resumes after step 2")
        proxy.waits_for = b"rank-00000.bin"
        command.wait_for("waiting for the checkpoint of step 3 to be on disk: ")
        return command

    impatient = saving()
    impatient.process.send_signal(signal.SIGINT)
    impatient.wait_for("SIGINT: the run saves and stops; Ctrl-C once more stops at once, without a checkpoint")
    assert "SIGINT: stopped at once, without a checkpoint" in impatient.stop(signal.SIGINT)

    patient = saving()
    patient.process.send_signal(signal.SIGTERM)
    patient.wait_for("SIGTERM: the run saves and stops")
    proxy.waits_for = None
    assert "finished at step 3" in patient.end()
    verify(f"{home}/run/step-00000003")


def test_ctrl_c_ends_imports_and_generation_without_a_traceback(byteloom: Any, recipe: Path, tmp_path: Path):
    importing = Command(tmp_path, "eval", "nothing", is_cold=True)
    maps = Path(f"/proc/{importing.process.pid}/maps")
    importing.wait_until(lambda: "libtorch" in maps.read_text())
    os.kill(importing.process.pid, signal.SIGINT)
    assert importing.end(-signal.SIGINT) == ""

    byteloom("train", recipe, "train.steps=1", "validation.shards=null", "optimizer.schedule.warmup_steps=0")
    generating = commands.start(
        ["generate", "runs/run", "--bytes", "10000000", "--temperature", "0"],  # the likeliest byte is no separator
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert generating.stdout is not None
    assert generating.stdout.read(1)
    generating.send_signal(signal.SIGINT)
    _, output = generating.communicate(timeout=LIMIT)
    assert generating.returncode == 128 + signal.SIGINT
    assert output.decode().strip() == "SIGINT: stopped"
