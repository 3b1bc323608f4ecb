"""Models of images and sound: the card travels into the run, and generation writes whole pictures and sounds."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.media import MediaCard
from data_pipeline.preparation.prepare import PrepareOptions, prepare
from data_pipeline.readers import ReadOptions
from data_pipeline.readers.formats.images import patch_scan
from data_pipeline.readers.restoring import options_of, png_of, wav_of
from data_pipeline.vocabulary import SEPARATOR, VOCABULARY
from pretrain.cli.app import app
from pretrain.config.checks.recipe import check_recipe
from pretrain.config.loading import load
from pretrain.evaluation.continuations import Continuations, OutputFormat
from pretrain.evaluation.generation import Sampling, SamplingError, row_generator, sample
from pretrain.training.loop import train
from pretrain.training.run import TrainingError
from pretrain.training.weights import find_checkpoint, trained_card
from tests.conftest import recipe_tree

DRAW = np.random.default_rng(0)
PICTURE = 8 * 8 * 3
IMAGE = MediaCard("image", "u8", 3, width=8, height=8, scan="raster")
SOUND = MediaCard("audio", "s16le", 2, 8000)
IMAGE_MODEL = {
    "family": "perceiver_ar",
    "sequence_length": PICTURE,
    "latents": 16,
    "latent_model": {"width": 16, "layers": 1, "heads": 2},
    "cross_heads": 2,
    "positions": "image",
    "image": [8, 8, 3],
}


def pixels(height: int = 8, width: int = 8) -> np.ndarray:
    return DRAW.integers(0, 256, (height, width, 3), np.uint8)


def write_pictures(folder: Path, width: int = 8) -> Path:
    (folder / "files").mkdir(parents=True)
    for number in range(8):
        Image.fromarray(pixels(8, width)).save(folder / f"files/{number}.png")
    return folder / "files"


def write_sound(path: Path, rate: int = 8000) -> None:
    soundfile.write(path, DRAW.integers(-3000, 3000, (rate // 20, 2)).astype("<i2"), rate)


def recipe_of(folder: Path, files: Path, reading: ReadOptions, **changes: Any) -> Path:
    prepare([files], folder / "corpus", PrepareOptions(reading=reading))
    tree: Any = recipe_tree(folder)
    tree["run"] = {"root": str(folder), "name": "run"}
    tree["data"] = {"shards": str(folder / "corpus"), **changes.pop("data", {})}
    tree["validation"] = {}
    tree["train"] = {"steps": 1, "global_batch": 2, "micro_batch": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree | changes))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    data = {"separate_documents": False}
    recipe = recipe_of(folder, write_pictures(folder), ReadOptions(), data=data, model=IMAGE_MODEL)
    assert train(load(recipe)) == 0
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "files").mkdir()
    write_sound(folder / "files/a.wav")
    assert train(load(recipe_of(folder, folder / "files", ReadOptions()))) == 0
    return folder


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_card_travels_into_the_run_and_the_export(images: Path, sounds: Path, tmp_path: Path):
    assert trained_card(find_checkpoint(str(images / "run"))) == IMAGE
    assert trained_card(find_checkpoint(str(sounds / "run"))) == SOUND
    assert command("checkpoint", "export", sounds / "run", "--out", tmp_path / "export").exit_code == 0
    assert json.loads((tmp_path / "export/card.json").read_text())["media"] == SOUND.as_json()
    assert trained_card(find_checkpoint(str(tmp_path / "export"))) == SOUND


@pytest.mark.slow
def test_a_picture_ends_at_its_last_pixel(images: Path, tmp_path: Path):
    assert command("generate", images / "run", "--bytes", 1000, "--out", tmp_path).exit_code == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "000-000.png"
    raw = command("generate", images / "run", "--bytes", 1000).stdout_bytes
    assert len(raw) == PICTURE
    with Image.open(path) as image:
        assert (image.size, image.mode) == ((8, 8), "RGB")
        assert np.asarray(image).tobytes() == raw


@pytest.mark.slow
@pytest.mark.parametrize("height", [2, 8])
def test_generation_continues_a_picture_after_the_rows_of_the_prompt(images: Path, tmp_path: Path, height: int):
    prompt = pixels(height)
    Image.fromarray(prompt).save(tmp_path / "prompt.png")
    options = ["--bytes", 120] if height == 8 else []
    done = command("generate", images / "run", "--prompt-file", tmp_path / "prompt.png", "--as", "png", *options)
    assert done.exit_code == 0, done.output
    with Image.open(io.BytesIO(done.stdout_bytes)) as image:
        written = np.asarray(image)
    kept = PICTURE - 120 if height == 8 else 2 * 8 * 3
    assert written.shape == (8, 8, 3)
    assert written.tobytes()[:kept] == prompt.tobytes()[:kept]


@pytest.mark.slow
def test_prompts_that_do_not_match_the_card_are_refused(images: Path, sounds: Path, tmp_path: Path):
    Image.fromarray(pixels(8, 4)).save(tmp_path / "narrow.png")
    Image.fromarray(pixels()).save(tmp_path / "whole.png")
    for path, run, expected in (
        (tmp_path / "narrow.png", images, "width"),
        (tmp_path / "whole.png", images, "a picture has 192"),
        (tmp_path / "whole.png", sounds, "kind"),
        (sounds / "files/a.wav", images, "kind"),
    ):
        done = command("generate", run / "run", "--prompt-file", path)
        assert isinstance(done.exception, SamplingError) and expected in str(done.exception), (path, done.exception)


@pytest.mark.slow
def test_sound_is_written_in_whole_samples(sounds: Path, tmp_path: Path):
    done = command("generate", sounds / "run", "--prompt", "abc", "--bytes", 30, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.iterdir()
    samples, rate = soundfile.read(path, dtype="int16")
    assert path.suffix == ".wav" and rate == 8000
    raw = command("generate", sounds / "run", "--prompt", "abc", "--bytes", 30).stdout_bytes
    assert (3 + len(raw)) % 4 == 0
    assert samples.astype("<i2").tobytes() == raw[1:]  # the first byte completes a sample of the prompt


def test_prompt_of_sound_is_resampled_to_the_rate_of_the_model(sounds: Path, tmp_path: Path):
    write_sound(tmp_path / "prompt.wav", 16000)
    done = command("generate", sounds / "run", "--prompt-file", tmp_path / "prompt.wav", "--bytes", 16, "--as", "wav")
    assert done.exit_code == 0, done.output
    assert soundfile.info(io.BytesIO(done.stdout_bytes)).samplerate == 8000


@pytest.mark.parametrize(("wanted", "card"), [("png", SOUND), ("wav", IMAGE), ("wav", None), ("png", None)])
def test_output_format_needs_a_card_of_the_same_medium(wanted: str, card: MediaCard | None):
    with pytest.raises(SamplingError, match=f"--as {wanted} needs"):
        Continuations(card, [b""], 100, OutputFormat(wanted), to_files=True)


@pytest.mark.parametrize("patch_size", [None, 12, 48])
def test_files_hold_the_bytes_that_a_reader_returns(patch_size: int | None):
    image = pixels()
    scan = "raster" if patch_size is None else "patch"
    card = MediaCard.from_json(IMAGE.as_json() | {"scan": scan, "patch_size": patch_size})
    scanned = image.tobytes() if patch_size is None else patch_scan(image, patch_size)
    with Image.open(io.BytesIO(png_of(scanned, card))) as written:
        assert np.array_equal(np.asarray(written), image)
    assert (options_of(card).image_scan, options_of(card).image_size) == (scan, None)
    samples = DRAW.integers(-(2**15), 2**15, (50, 2)).astype("<i2")
    read, rate = soundfile.read(io.BytesIO(wav_of(samples.tobytes(), SOUND)), dtype="int16")
    assert rate == 8000 and np.array_equal(read, samples)


@pytest.mark.parametrize("temperature", [0, 1])
def test_separator_is_not_drawn_if_training_had_no_separators(temperature: float):
    logits = torch.zeros(1, VOCABULARY)
    logits[0, SEPARATOR] = 100.0
    generators = [row_generator(0, 0)]
    assert sample(logits, Sampling(temperature), generators) == [SEPARATOR]
    assert sample(logits, Sampling(temperature, separators=False), generators)[0] < 256


@pytest.mark.slow
@pytest.mark.parametrize("corpus", ["narrow", "patches", "text"])
def test_image_positions_are_refused_on_other_documents(tmp_path: Path, corpus: str):
    if corpus == "text":
        (tmp_path / "files").mkdir()
        (tmp_path / "files/a.txt").write_text("a text " * 200)
    else:
        write_pictures(tmp_path, width=4 if corpus == "narrow" else 8)
    reading = ReadOptions(image_scan="patch", patch_size=48) if corpus == "patches" else ReadOptions()
    recipe = recipe_of(tmp_path, tmp_path / "files", reading, model=IMAGE_MODEL)
    with pytest.raises(TrainingError, match="needs images of 8 x 8 pixels and 3 channels in raster scan"):
        train(load(recipe))
    faults = {finding.field: finding.text for finding in check_recipe(recipe, []) if finding.level == "error"}
    assert "needs images of 8 x 8 pixels" in faults["model.positions"]


@pytest.mark.parametrize("name", ["a.txt", "a.wav", "a.png"])
def test_eval_scores_an_ordinary_file(sounds: Path, images: Path, tmp_path: Path, name: str):
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("text")
    elif name == "a.wav":
        write_sound(path)
    else:
        Image.fromarray(pixels()).save(path)
    done = command("eval", (images if name == "a.png" else sounds) / "run", path, "--json")
    assert done.exit_code == 0, done.output
    expected = {"a.txt": 4, "a.wav": 1600, "a.png": PICTURE}[name]
    assert json.loads(done.stdout)["total"]["bytes"] == expected
