"""Runs of objectives other than causal: they train, resume exactly, and name their losses everywhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from byteloom import load
from data_pipeline.preparation.prepare import PrepareOptions, prepare
from data_pipeline.readers.options import ReadOptions
from data_pipeline.vocabulary import PADDING
from pretrain.cli.app import app
from pretrain.evaluation.generation import SamplingError
from pretrain.evaluation.scores import EvaluationError
from pretrain.models import build_model, small_config
from pretrain.objectives.classification import HIDDEN
from pretrain.training.weights.exports import write_export
from tests.commands import run_here
from tests.conftest import Run, recipe_tree
from tests.distributed.parity import content

SMALL = {"width": 32, "layers": 2, "heads": 2, "initial_std": 0.02}
LENGTHS = {"sequence_length": 128, "source_length": 110, "target_length": 21}
RUNS: dict[str, dict[str, Any]] = {
    "masked": {"family": "encoder", "sequence_length": 128, **SMALL},
    "span_corruption": {"family": "encoder_decoder", **LENGTHS, "special_ids": 1, **SMALL},
    "prefix": {"family": "transformer", "sequence_length": 128, **SMALL},
}
"""Section `model` by objective."""
IN_TURN = [name if name == "masked" else pytest.param(name, marks=pytest.mark.long) for name in RUNS]


@pytest.mark.parametrize("objective", IN_TURN)
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
    (stored,) = (whole / "evaluations/step-00000012").glob("*/figures.json")
    assert json.loads(stored.read_text()) == evaluated
    byteloom("report", whole, "--out", tmp_path / "page.html")
    assert f"Objective {objective}, rows of 128 ids" in (tmp_path / "page.html").read_text()
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


def test_labels_that_do_not_fit_a_row_are_reported(byteloom: Run, tmp_path: Path):
    lines = [json.dumps({"text": "a document longer than a row", "label": letter}) for letter in "ab" * 8]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    byteloom("prepare", "pairs.jsonl", "--field", "text", "--target-field", "label", "--out", "corpus")
    tree = {
        "data": {"shards": "corpus", "packing": "document"},
        "model": {"family": "encoder", "sequence_length": 16, **SMALL},
        "objective": {"name": "classification"},
        "train": {"steps": 1, "global_batch": 2, "micro_batch": 2},
        "optimizer": {"schedule": {"warmup_steps": 0}},
        "tracking": {"enabled": False},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    log = byteloom("train", recipe, "run.name=short").stderr
    assert "step 1 has no label byte to learn; model.sequence_length 16 may cut off" in log
    with pytest.raises(EvaluationError, match="has no label byte to score"):
        CliRunner().invoke(
            app, ["eval", str(tmp_path / "runs/short"), str(tmp_path / "corpus")], catch_exceptions=False
        )


@torch.no_grad()
def test_evaluation_of_a_classification_shows_the_share_of_labels_that_are_likeliest(tmp_path: Path):
    """The likeliest label is that of the lowest loss, if each byte in turn is the label."""
    texts = [f"{number} texts" for number in range(8)]
    lines = [json.dumps({"text": text, "label": "ab"[number % 2]}) for number, text in enumerate(texts)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = PrepareOptions(reading=ReadOptions(field="text", target_field="label"))
    prepare([str(tmp_path / "pairs.jsonl")], tmp_path / "corpus", options)
    config, objective = small_config("encoder"), {"objective": {"name": "classification"}}
    torch.manual_seed(3)
    weights = {name: torch.randn(value.shape) for name, value in build_model(config).named_parameters()}
    weights["head_bias"][list(b"ab")] += 200  # one of these two is the likeliest
    write_export(tmp_path / "export", weights, {"model": config.model_dump(mode="json")} | objective, {})
    code, output = run_here("eval", tmp_path / "export", tmp_path / "corpus", "--json", "--device", "cpu")
    assert code == 0, output
    model, right = load(tmp_path / "export", "cpu").module, 0
    for number, text in enumerate(texts):
        given = torch.full((256, 32), PADDING)
        given[:, 0], given[:, 1 : len(text) + 1] = HIDDEN, torch.tensor(list(text.encode()))
        losses = model(torch.arange(256)[:, None].expand(-1, 32), given)[:, 0]
        right += int(losses.argmin()) == b"ab"[number % 2]
    found = json.loads(output[output.index("{") :])
    assert 0 < right < 8 and found["accuracy"] == right / 8 and found["bytes"] == 8
    code, output = run_here("eval", tmp_path / "export", tmp_path / "corpus", "--device", "cpu")
    assert f"{right / 8:.2%}" in output and "accuracy" in output


@pytest.mark.long
def test_models_train_on_pairs_and_answer_sources(byteloom: Run, tmp_path: Path):
    """The pairs are of one letter, so few steps suffice; both kinds of model end their answers."""
    lines = [json.dumps({"source": letter, "target": letter.upper()}) for letter in "abcd" * 40]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    fields = ("--field", "source", "--target-field", "target")
    byteloom("prepare", "pairs.jsonl", *fields, "--out", "corpus")
    tree = recipe_tree(tmp_path / "none") | {
        "data": {"shards": "corpus", "packing": "document", "lanes": 4},
        "validation": {"shards": "corpus"},
        "objective": {"name": "conditional"},
        "train": {"steps": 60, "global_batch": 16, "micro_batch": 16},
    }
    size = {"sequence_length": 8, **SMALL, "initial_std": 0.2, "dropout": 0.0}
    lengths = {"source_length": 2, "target_length": 3}
    for model in ({"family": "encoder_decoder", **size, **lengths}, {"family": "transformer", **size}):
        recipe = tmp_path / f"{model['family']}.yaml"
        recipe.write_text(yaml.safe_dump(tree | {"model": model}), encoding="utf-8")
        byteloom("train", recipe, f"run.name={model['family']}")
        run = tmp_path / "runs" / str(model["family"])
        assert json.loads(byteloom("eval", run, "--json").stdout)["bits_per_target_byte"] < 0.5
        for letter in "abcd":
            asked = ("generate", run, "--prompt", letter)
            assert byteloom(*asked, "--temperature", "0").stdout == letter.upper()
            if model["family"] == "encoder_decoder":
                assert byteloom(*asked, "--beams", "3").stdout == letter.upper()
    refused = byteloom("generate", tmp_path / "runs/transformer", "--beams", "2", check=False)
    assert "is a transformer; beams need an encoder_decoder" in refused.stderr


def test_row_that_is_no_pair_stops_the_run(byteloom: Run, corpus_folder: Path, tmp_path: Path):
    tree = recipe_tree(corpus_folder)
    tree |= {
        "data": {"shards": str(corpus_folder / "train"), "packing": "document"},
        "model": {"family": "transformer", "sequence_length": 64, **SMALL},
        "objective": {"name": "conditional"},
        "validation": {},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    stopped = byteloom("train", recipe, check=False)
    assert stopped.returncode == 1
    assert "is no pair of a source and a target" in stopped.stderr.splitlines()[-1]
