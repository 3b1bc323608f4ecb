"""Arguments of commands: paths with a home folder, and numbers that are not finite."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import CorpusError
from pretrain.cli.app import app
from pretrain.evaluation.generation import Sampling, SamplingError
from pretrain.training.run_folder import RunFolderError
from tests.conftest import prepare_corpus


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home folder next to the empty working directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize(
    "command",
    [
        "train ~/x.yaml",
        "config show ~/x.yaml",
        "config check ~/x.yaml",
        "submit ~/x.yaml --cluster=local",
        "submit RECIPE --cluster=~/x.yaml",
        "sweep ~/x.yaml train.seed=0,1",
        "sweep RECIPE train.seed=0,1 --cluster=~/x.yaml",
        "compare ~/x.yaml --bytes=1",
        "models --recipes=~/x",
        "models estimate ~/x.yaml",
        "eval ~/x",
        "generate ~/x",
        "generate RUN --prompt-file=~/x",
        "track ~/x",
        "inspect ~/x",
        "verify ~/x",
        "withdraw ~/x key",
        "withdraw RUN --list=~/x",
        "prepare ~/x --out=corpus",
        "status ~/x",
        "top ~/x",
        "logs ~/x",
        "cancel ~/x",
        "checkpoint list ~/x",
        "checkpoint verify ~/x",
        "checkpoint show ~/x",
        "checkpoint prune ~/x --keep=1",
        "checkpoint export ~/x --out=out",
    ],
)
def test_home_folder_is_expanded_in_every_path_of_a_command(home: Path, recipe: Path, command: str):
    """~/x does not exist, so each command names the path that it tried."""
    words = [str(recipe) if word == "RECIPE" else word for word in command.split()]
    done = CliRunner().invoke(app, words)
    text = f"{done.output} {done.exception}".replace("\n", "")
    assert done.exit_code and f"{home}/x" in text, text
    assert list(Path.cwd().iterdir()) == []


def test_corpus_is_prepared_from_and_into_the_home_folder(home: Path):
    (home / "text").write_text("bytes")
    done = CliRunner().invoke(app, ["prepare", "~/text", "--out=~/corpus", "--workers=1"])
    assert done.exit_code == 0, done.output
    assert (home / "corpus/manifest.json").exists()
    assert list(Path.cwd().iterdir()) == []


def test_folder_named_tilde_is_reached_with_a_leading_dot(home: Path, tmp_path: Path):
    prepare_corpus([Path(__file__)], tmp_path / "work/~")
    assert CliRunner().invoke(app, ["verify", "./~"]).exit_code == 0
    assert isinstance(CliRunner().invoke(app, ["verify", "~"]).exception, CorpusError)
    text = CliRunner().invoke(app, ["logs", "./~"]).exception
    assert isinstance(text, RunFolderError) and str(home) not in str(text)


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_non_finite_numbers_are_refused(recipe: Path, number: str):
    done = CliRunner().invoke(app, ["models", "estimate", str(recipe), f"--memory={number}"])
    assert done.exit_code == 2, done.output
    with pytest.raises(SamplingError, match=f"temperature is {number}"):
        Sampling(temperature=float(number))
    with pytest.raises(SamplingError, match=f"top-p is {number}"):
        Sampling(top_p=float(number))
    done = CliRunner().invoke(app, ["prepare", str(recipe), "--out=corpus", f"--holdout={number}"])
    assert isinstance(done.exception, CorpusError)
