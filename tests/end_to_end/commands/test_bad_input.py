"""Bad input of the real commands: one clear line, a non-zero exit code, and no partial output."""

import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import Run, train_once


def refusal(byteloom: Run, *arguments: object) -> str:
    """Return the one line with which a command refuses its input."""
    done = byteloom(*arguments, check=False)
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert done.stdout == ""
    return lines[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.txt").write_text("words " * 2000)
    return tmp_path


@pytest.fixture(scope="module")
def trained_once(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_once(tmp_path_factory.mktemp("trained"), corpus_folder)


@pytest.fixture
def trained(trained_once: Path, recipe: Path) -> Path:
    """Return a copy of a finished run."""
    return shutil.copytree(trained_once, recipe.parent / "runs/run")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_prepare_refuses_a_missing_path(byteloom: Run, folder: Path):
    before = names(folder)
    assert "no such file or folder: nowhere" in refusal(byteloom, "prepare", "files", "nowhere", "--out", "out")
    assert names(folder) == before


def test_prepare_refuses_an_empty_corpus(byteloom: Run, folder: Path):
    (folder / "empty").mkdir()
    (folder / "empty/void").touch()
    before = names(folder)
    assert "the corpus is empty" in refusal(byteloom, "prepare", "empty", "--out", "out")
    assert "the corpus is empty" in refusal(byteloom, "prepare", "files", "--include", "*.py", "--out", "out")
    assert names(folder) == before


def test_prepare_refuses_or_skips_an_unreadable_file(byteloom: Run, folder: Path):
    os.mkfifo(folder / "files/broken")
    before = names(folder)
    message = refusal(byteloom, "prepare", "files", "--out", "out")
    assert "unreadable: files/broken: not a regular file; --skip-bad" in message
    assert names(folder) == before
    done = byteloom("prepare", "files", "--out", "out", "--skip-bad")
    assert "unreadable" in done.stderr
    assert "files/broken" in (folder / "out/skipped.jsonl").read_text()


def test_prepare_refuses_an_existing_folder(byteloom: Run, folder: Path):
    before = names(folder)
    assert "files exists already" in refusal(byteloom, "prepare", "files", "--out", "files")
    assert names(folder) == before


def test_inspect_refuses_a_folder_without_a_corpus(byteloom: Run, folder: Path):
    assert "it has no manifest.json" in refusal(byteloom, "inspect", "files")
    assert "no such folder" in refusal(byteloom, "inspect", "nowhere")


def test_truncated_manifest_is_refused(byteloom: Run, folder: Path, recipe: Path):
    byteloom("prepare", "files", "--out", "out")
    manifest = folder / "out/manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    before = names(folder)
    assert "manifest.json is damaged" in refusal(byteloom, "inspect", "out")
    assert "manifest.json is damaged" in refusal(byteloom, "train", recipe, "data.shards=out")
    assert names(folder) == before


def test_training_stops_at_a_corrupt_block(byteloom: Run, folder: Path, recipe: Path):
    byteloom("prepare", "files", "--out", "out")
    shard = folder / "out/shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[520] ^= 1
    shard.write_bytes(content)
    done = byteloom("train", recipe, "data.shards=out", "validation.shards=null", check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: block 000000-000000 of out/shard-000000.tar is damaged")
    assert not (folder / "runs/run/checkpoints").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", "train.stepz is not a field of TrainConfig (did you mean steps?)"),
        ("model.patch_size=3", "sequence_length (128) is not a multiple of patch_size (3)"),
        ("model.local_model.heads=5", "heads (5) does not divide width (16)"),
        ("data.shards=nowhere", "no corpus at nowhere"),
        ("validation.shards=nowhere", "no corpus at nowhere"),
        ("engine.device=cuda", "torch finds none on this machine"),
        ("model.sequence_length=1048576", "less than one sequence"),
    ],
)
def test_impossible_recipe_leaves_no_run_folder(byteloom: Run, recipe: Path, override: str, message: str):
    assert message in refusal(byteloom, "train", recipe, override)
    assert not (recipe.parent / "runs").exists()


def test_checkpoint_of_another_model_is_refused(byteloom: Run, recipe: Path, trained: Path):
    before = {
        path: path.read_bytes()
        for path in trained.rglob("*")
        if path.is_file() and path.name not in ("train.log", ".lock")
    }
    message = refusal(byteloom, "train", recipe, "model.local_model.width=32")
    assert "runs/run has a run of another model (model.local_model.width: 16 -> 32); restore the old model" in message
    assert {path: path.read_bytes() for path in before} == before


def test_checkpoint_of_another_optimizer_is_refused(byteloom: Run, recipe: Path, trained: Path):
    config = (trained / "config.yaml").read_text()
    done = byteloom("train", recipe, "train.steps=1000", "optimizer.name=adam", check=False)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert "has the moments of optimizer.name=adamw, not of adam; set adamw again" in message
    assert (trained / "config.yaml").read_text() == config


def test_resumed_run_refuses_a_changed_corpus(byteloom: Run, recipe: Path, trained: Path, folder: Path):
    config = (trained / "config.yaml").read_text()
    byteloom("prepare", "files", "--out", "out")
    message = refusal(byteloom, "train", recipe, "data.shards=out")
    assert "has a run that reads other bytes (data.shards: " in message
    message = refusal(byteloom, "train", recipe, "data.seed=5")
    assert "has a run that reads other bytes (data.seed: 0 -> 5)" in message
    assert (trained / "config.yaml").read_text() == config


def test_run_resumes_with_a_moved_corpus_of_the_same_content(
    byteloom: Run, recipe: Path, trained: Path, corpus_folder: Path
):
    moved = recipe.parent / "moved"
    moved.symlink_to(corpus_folder / "train")
    byteloom("train", recipe, "train.steps=14", f"data.shards={moved}")


def test_eval_and_generate_refuse_a_folder_without_a_checkpoint(byteloom: Run, folder: Path):
    assert "files has no valid checkpoint" in refusal(byteloom, "eval", "files", "files")
    assert "nowhere has no valid checkpoint" in refusal(byteloom, "generate", "nowhere")


def test_generate_refuses_impossible_options(byteloom: Run, trained: Path):
    assert "top-p is 0.0" in refusal(byteloom, "generate", trained, "--top-p", "0")
    assert "cannot read nowhere" in refusal(byteloom, "generate", trained, "--prompt-file", "nowhere")


def test_track_refuses_a_folder_without_a_run(byteloom: Run, folder: Path):
    assert "no mlflow.json" in refusal(byteloom, "track", "files")
    assert "no mlflow.json" in refusal(byteloom, "track", "nowhere")
    assert not (folder / "nowhere").exists()
