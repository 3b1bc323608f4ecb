"""Samples during training: they change nothing of a run, and every step has them once."""

import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from byteloom import load as load_model
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.media import MediaCard
from data_pipeline.preparation.prepare import PrepareOptions, prepare
from pretrain.config.errors import ConfigError
from pretrain.config.loading import load
from pretrain.evaluation.generation import Sampling
from pretrain.tracking.samples import (
    FILE,
    SampleSet,
    as_text,
    has_samples,
    read_samples,
    sample_folders,
    write_samples,
)
from pretrain.training.callbacks import samples
from pretrain.training.callbacks.side_process import SideProcess
from pretrain.training.loop import train
from pretrain.training.run_folder import RunFolder
from pretrain.training.sampling import SamplesConfig
from pretrain.training.sampling.writing import prompts_of, write_continuations
from tests.conftest import Run, recipe_tree
from tests.distributed.parity import content
from tests.mlflow_server import client_of, make_store

STEPS = 4
PROMPTS = '["def ", "class "]'


@pytest.fixture
def recipe(tmp_path: Path, corpus_folder: Path) -> Path:
    tree: Any = recipe_tree(corpus_folder)
    tree["run"] = {"name": "plain", "root": str(tmp_path / "runs")}
    tree["train"]["steps"] = STEPS
    tree["checkpoint"] = {"every": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "recipe.yaml"


def run_of(recipe: Path, name: str, *overrides: str) -> RunFolder:
    config = load(recipe, [f"run.name={name}", *overrides])
    assert train(config) == 0
    return RunFolder(Path(config.run.root) / name)


def numbers_of(run: RunFolder) -> list[dict[str, float]]:
    """Return the numbers of a run that do not depend on time."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    exact = ("step", "train/bits_per_byte", "validation/bits_per_byte", "gradient_norm")
    return [{name: line[name] for name in exact if name in line} for line in lines]


def steps_of(run: RunFolder) -> list[int]:
    return [read_samples(folder).step for folder in sample_folders(run.samples)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_samples_change_no_number_and_a_repeated_step_has_them_once(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(samples, "LAST_SECONDS", 800.0)  # a loaded machine
    make_store(tmp_path / "runs/mlflow.db")
    caplog.set_level(logging.INFO, "pretrain")
    sampled_as = ("samples.every=2", f"samples.prompts={PROMPTS}", "samples.bytes=20", "tracking.enabled=true")
    plain, sampled = run_of(recipe, "plain"), run_of(recipe, "sampled", *sampled_as)
    assert numbers_of(sampled) == numbers_of(plain)
    for step in (2, STEPS):
        place = f"checkpoints/step-{step:08d}"
        assert content(sampled.path / place) == content(plain.path / place)

    assert steps_of(sampled) == [2, 4] and not plain.samples.exists()
    [first, second, held_out] = read_samples(sample_folders(sampled.samples)[-1]).samples
    assert (first.prompt, second.prompt, len(first.continuation)) == (b"def ", b"class ", 20)
    assert held_out.source.startswith("held-out ") and len(held_out.prompt) == 64  # half of the context
    shown = as_text(first.continuation)
    assert f'step 4, prompt 1: "def " continues {json.dumps(shown, ensure_ascii=False)}' in caplog.messages

    (sampled.path / "checkpoints/step-00000004").rename(tmp_path / "lost")
    before = read_samples(sample_folders(sampled.samples)[-1])
    run_of(recipe, "sampled", *sampled_as)
    assert steps_of(sampled) == [2, 4]
    assert read_samples(sample_folders(sampled.samples)[-1]).samples == before.samples
    client = client_of(f"sqlite:///{tmp_path}/runs/mlflow.db")
    run_id = json.loads(sampled.mlflow.read_text())["run_id"]
    folders = [file.path for file in client.list_artifacts(run_id, "samples")]
    assert folders == ["samples/step-00000002", "samples/step-00000004"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.long)])
def test_samples_of_a_sharded_run_are_those_of_its_checkpoint(recipe: Path, byteloom: Run, tmp_path: Path, engine: str):
    how = (f"engine.name={engine}", "launch.processes=2", "train.steps=2", "validation={}")
    wanted = ("samples.every=2", f"samples.prompts={PROMPTS}", "samples.bytes=20")
    done = byteloom("train", recipe, f"run.name={engine}", *how, *wanted)
    assert done.returncode == 0, done.stderr
    run = RunFolder(tmp_path / "runs" / engine)
    if not sample_folders(run.samples):  # a loaded machine: they took longer than a run waits for them
        assert "samples were not written: it took longer than 60 s" in done.stderr
        assert byteloom("samples", run.path, "--step", 2).returncode == 0
    [folder] = sample_folders(run.samples)
    first, _ = read_samples(folder).samples
    model = load_model(run.path / "checkpoints" / folder.name, "cpu")
    assert first.continuation == b"".join(model.generate(b"def ", bytes=20))
    deleted = byteloom("samples", run.path, "--step", 1, "--beside", check=False)
    assert deleted.returncode == 1 and "no checkpoint of step 1 any more, only newer ones" in deleted.stderr


def test_folder_that_a_killed_process_has_half_removed_has_no_samples(tmp_path: Path):
    found = SampleSet(step=2, time=0.0, temperature=1.0, samples=())
    write_samples(tmp_path / "samples", found, {"0.png": b"picture"})
    [folder] = sample_folders(tmp_path / "samples")
    (folder / FILE).unlink()  # `remove_samples` begins with it
    assert sample_folders(tmp_path / "samples") == [] and not has_samples(tmp_path / "samples", 2)
    write_samples(tmp_path / "samples", found, {})
    assert [path.name for path in folder.iterdir()] == [FILE] and read_samples(folder) == found


def test_signal_that_ends_the_writer_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    os.mkfifo(tmp_path / "pipe")
    writer = SideProcess("samples were not written")
    assert writer.begin("prepare", str(tmp_path / "pipe"), "--out", str(tmp_path / "corpus"))  # it waits for the pipe
    assert writer._process is not None
    writer._process.kill()
    writer._process.wait()
    assert not writer.take_result()
    assert caplog.messages == ["samples were not written: its writer was killed by SIGKILL"]


def test_samples_come_from_checkpoints(recipe: Path):
    assert load(recipe, ["samples.every=6"]).samples.every == 6
    with pytest.raises(ConfigError, match=r"samples.every \(5\) is not a multiple of checkpoint.every \(2\)"):
        load(recipe, ["samples.every=5"])


def test_samples_of_a_model_that_predicts_no_next_byte_are_refused_in_the_recipe():
    assert load("encoder/debug").samples.every == 0
    with pytest.raises(ConfigError, match=r"objective\.name masked predicts no next byte, so there are no samples"):
        load("encoder/debug", ["samples.every=1000"])


@settings(max_examples=20)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), st.binary(max_size=3))
def test_text_stays_text_and_other_bytes_are_hexadecimal(text: str, tail: bytes):
    assert as_text(text.encode()) == text
    assert as_text(text.encode() * 20 + b"\xff").endswith("\\xff")
    assert as_text(b"\xff\x00\xfe" + tail) == (b"\xff\x00\xfe" + tail).hex(" ")


PICTURE = MediaCard("image", "u8", 3, width=8, height=8, scan="raster")
SOUND = MediaCard("audio", "s16le", 1, 8000)


def counting(prompts: Sequence[bytes], counts: Sequence[int], sampling: Sampling) -> Iterator[tuple[int, int]]:
    """Yield 0, 1, 2, … for each row."""
    return ((row, byte % 256) for row, count in enumerate(counts) for byte in range(count))


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_media_continue_half_of_a_held_out_document_as_a_file_that_programs_open(kind: str, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    pixels, frames = np.arange(192, dtype=np.uint8).reshape(8, 8, 3), np.arange(300, dtype="<i2")
    if kind == "image":
        Image.fromarray(pixels).save(source / "a.png")
    else:
        soundfile.write(source / "a.wav", frames, 8000)
    prepare([source], tmp_path / "corpus", PrepareOptions())
    card = PICTURE if kind == "image" else SOUND
    with Corpus(tmp_path / "corpus") as corpus:
        prompts = prompts_of(SamplesConfig(), card, 4096, corpus)
    found, files = write_continuations(SamplesConfig(), prompts, card, counting, step=3, time=0.0)
    [sample], [file] = found.samples, files.values()
    assert sample.source.startswith("held-out source/a.")
    if kind == "image":
        shown = np.asarray(Image.open(io.BytesIO(file)))
        assert shown.tobytes() == pixels.tobytes()[:96] + bytes(range(96)) == sample.prompt + sample.continuation
    else:
        heard, rate = soundfile.read(io.BytesIO(file), dtype="int16")
        assert sample.prompt == frames.tobytes()[:300]
        assert (heard.tobytes(), rate) == (sample.continuation, 8000) == (bytes(range(256)), 8000)
