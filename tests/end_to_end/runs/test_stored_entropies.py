"""A run whose patches come from entropies beside its corpus: what it needs, how it resumes, and what is made of it."""

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_pipeline.stream.reading import open_streams
from pretrain.config.checks.recipe import check_recipe
from pretrain.config.loading import load
from pretrain.models import build_model, small_config
from pretrain.models.entropy_model import stored_entropies_of
from pretrain.training.weights.exports import write_export
from tests import commands
from tests.commands import run_here
from tests.conftest import recipe_tree


@pytest.fixture(scope="module")
def recipe(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe beside a small model with random weights and a corpus without entropies."""
    folder = tmp_path_factory.mktemp("stored")
    shutil.copytree(corpus_folder, folder / "corpus")
    byte_model = small_config("transformer", sequence_length=64, window=8)
    torch.manual_seed(1)
    weights = {name: torch.randn(value.shape) * 0.3 for name, value in build_model(byte_model).named_parameters()}
    write_export(folder / "small", weights, {"model": byte_model.model_dump(mode="json")}, {})
    tree: dict[str, Any] = recipe_tree(folder / "corpus")
    patcher = {"name": "entropy", "model": str(folder / "small"), "entropies": "corpus", "threshold": 4.9}
    changes = {"sequence_length": 64, "patches": 32, "patcher": patcher | {"reset_at_newlines": True}, "dropout": 0.0}
    tree["model"] = small_config("blt", **changes).model_dump(mode="json")
    tree["run"] = {"name": "run", "root": str(folder / "runs")}
    tree["train"] = {"steps": 4, "global_batch": 6, "micro_batch": 2}
    tree["optimizer"]["schedule"]["shape"] = "constant"
    tree["checkpoint"], tree["validation"]["every"] = {"every": 2}, 4
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def numbers(run: Path, name: str) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in records if name in record]


def test_run_reads_the_entropies_beside_its_corpus(recipe: Path):
    corpus, root = recipe.parent / "corpus" / "train", recipe.parent / "runs"
    (fault,) = [finding for finding in check_recipe(recipe, []) if finding.level == "error"]
    assert f"byteloom entropies {corpus} --model EXPORT --reset-at-newlines" in fault.text
    for written in ("", " 0 of them"):
        code, output = run_here("entropies", corpus, "--model", recipe.parent / "small", "--reset-at-newlines")
        assert code == 0 and written in output, output
    assert [finding for finding in check_recipe(recipe, []) if finding.level == "error"] == []
    assert run_here("verify", corpus)[0] == 0

    def train(name: str, *overrides: str) -> Path:
        commands.run(
            ["train", recipe, f"run.name={name}", *overrides], cwd=recipe.parent, check=True, stderr=subprocess.DEVNULL
        )
        return root / name

    whole = train("whole")
    config = load(recipe, [])
    (stream,) = open_streams(config.data, 64, stored_entropies_of(config.model)).values()
    rows = stream.read(np.arange(6))
    model = build_model(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = model.first_values(name, tuple(parameter.shape), config.train.seed)
            parameter.copy_(values.view_as(parameter))
        assert rows.entropies is not None
        ids = torch.from_numpy(rows.ids)
        nats = model.eval()(ids, torch.from_numpy(rows.entropies))[ids < 256].mean()
    assert numbers(whole, "train/bits_per_byte")[0] == pytest.approx(float(nats) / math.log(2), rel=1e-4)

    train("resumed", "train.steps=2", "launch.processes=2", "engine.name=fsdp", "validation.shards=null")
    resumed = train("resumed", "validation.shards=null")
    for each in ("train/bits_per_byte", "train/bytes_per_patch"):
        assert numbers(resumed, each) == pytest.approx(numbers(whole, each), rel=1e-3), each
    code, output = run_here("eval", whole, recipe.parent / "corpus" / "validation", "--json", "--device", "cpu")
    assert code == 0, output
    scored = json.loads(output[output.index("{") :])["total"]
    assert scored["bits_per_byte"] == pytest.approx(numbers(whole, "validation/bits_per_byte")[-1], rel=1e-4)
