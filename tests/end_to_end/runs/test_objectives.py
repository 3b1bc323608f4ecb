"""Runs of objectives other than causal: they train, resume exactly, and name their losses everywhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from byteloom import load
from pretrain.cli.app import app
from pretrain.evaluation.generation import SamplingError
from pretrain.evaluation.scores import EvaluationError
from tests.conftest import Run, recipe_tree
from tests.distributed.parity import content

SMALL = {"width": 32, "layers": 2, "heads": 2, "initial_std": 0.02}
RUNS: dict[str, dict[str, Any]] = {
    "masked": {"family": "encoder", "sequence_length": 128, **SMALL},
}


@pytest.mark.parametrize("objective", RUNS)
def test_run_resumes_exactly_and_its_loss_has_one_name_everywhere(
    byteloom: Run, corpus_folder: Path, tmp_path: Path, objective: str
):
    tree = recipe_tree(corpus_folder) | {"model": RUNS[objective], "objective": {"name": objective}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    started = byteloom("train", recipe, "run.name=whole")
    whole = tmp_path / "runs/whole"
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    (metric,) = {name.rpartition("/")[2] for record in records for name in record if "bits_per_" in name}
    assert metric != "bits_per_byte"
    unit = metric.replace("_", " ").replace("bits per ", "bits/")
    first, last = (records[step][f"validation/{metric}"] for step in (0, -1))
    assert last < first - 0.2
    assert unit in started.stderr

    byteloom("train", recipe, "run.name=cut")
    cut = tmp_path / "runs/cut/checkpoints"
    for step in (8, 12):
        shutil.rmtree(cut / f"step-{step:08d}")
    assert "resumes after step 4" in byteloom("train", recipe, "run.name=cut").stderr
    assert content(whole / "checkpoints/step-00000012") == content(cut / "step-00000012")

    evaluated = json.loads(byteloom("eval", whole, "--json").stdout)
    assert evaluated[metric] == pytest.approx(last, rel=1e-6)
    assert "bits_per_byte" not in evaluated
    (status,) = json.loads(byteloom("status", whole, "--json").stdout)
    assert (status["metric"], status["bits_per_byte"], status["validation_loss"]) == (metric, None, last)
    byteloom("checkpoint", "export", whole, "--out", tmp_path / "export")
    card = json.loads((tmp_path / "export/card.json").read_text())
    assert card["objective"]["name"] == objective
    assert card[metric]["validation"] == last
    assert "bits_per_byte" not in card


def test_encoder_refuses_what_only_a_causal_model_does(corpus_folder: Path, tmp_path: Path, byteloom: Run):
    steps = {"steps": 1, "global_batch": 2, "micro_batch": 2}
    tree = recipe_tree(corpus_folder) | {"model": RUNS["masked"], "objective": {"name": "masked"}, "train": steps}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    byteloom("train", recipe)
    run = tmp_path / "runs/run"
    generated = CliRunner().invoke(app, ["generate", str(run)])
    assert isinstance(generated.exception, SamplingError)
    assert "predicts hidden bytes, and no next one, so it does not generate" in str(generated.exception)
    with pytest.raises(EvaluationError, match="has no bits per byte; its loss is bits_per_masked_byte"):
        load(run).bits_per_byte(b"text")
    shown = CliRunner().invoke(app, ["eval", str(run), "--mode", "sliding"])
    assert "whose loss has no mode, stride, words and curves" in str(shown.exception)
    again = byteloom("train", recipe, "train.steps=2", "objective.share=0.3", check=False)
    assert "belongs to a run with another objective (objective.share" in again.stderr
