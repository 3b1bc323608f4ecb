"""Training, evaluation and generation of a Perceiver AR with the real commands."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pretrain.cli.app import app
from tests.conftest import Run, recipe_tree
from tests.distributed.parity import content


@pytest.fixture
def recipe(tmp_path: Path, corpus_folder: Path) -> Path:
    """Return a recipe of twelve steps, with crops, dropout and dropped inputs."""
    tree = recipe_tree(corpus_folder)
    tree["model"] = {
        "family": "perceiver_ar",
        "sequence_length": 128,
        "latents": 32,
        "latent_model": {"width": 32, "layers": 2, "heads": 2},
        "cross_heads": 2,
        "cross_attend_dropout": 0.2,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_perceiver_ar_trains_resumes_exactly_scores_every_byte_and_generates(
    byteloom: Run, recipe: Path, tmp_path: Path
):
    byteloom("train", recipe, "run.name=whole")
    whole = tmp_path / "runs/whole"
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["validation/bits_per_byte"] < records[0]["validation/bits_per_byte"] - 0.2

    byteloom("train", recipe, "run.name=cut")
    cut = tmp_path / "runs/cut/checkpoints"
    for step in (8, 12):
        shutil.rmtree(cut / f"step-{step:08d}")
    assert "resumes after step 4" in byteloom("train", recipe, "run.name=cut").stderr
    assert content(whole / "checkpoints/step-00000012") == content(cut / "step-00000012")

    figures = {}
    for options in ((), ("--stride", "8"), ("--latents", "128"), ("--latents", "16")):
        shown = CliRunner().invoke(app, ["eval", str(whole), "--json", *options], catch_exceptions=False)
        figures[options] = json.loads(shown.stdout)["total"]
    assert len({figure["bytes"] for figure in figures.values()}) == 1
    assert len({figure["bits_per_byte"] for figure in figures.values()}) == 4
    assert figures[()]["bits_per_byte"] == pytest.approx(records[-1]["validation/bits_per_byte"], rel=1e-6)

    for options, fault in {
        ("eval", "--stride", "33"): "stride is 33; this model scores at most 32 bytes of a window",
        ("generate", "--latents", "129"): "--latents 129: latents (129) are more than sequence_length (128)",
    }.items():
        assert str(CliRunner().invoke(app, [options[0], str(whole), *options[1:]]).exception) == fault

    options = ("--prompt", "def ", "--bytes", "200", "--temperature", "0", "--latents", "16")
    assert byteloom("generate", whole, *options).stdout
