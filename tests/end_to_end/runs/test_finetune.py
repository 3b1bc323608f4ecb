"""A run of adapters on another run's weights: what it keeps, how it resumes, and what is made of it."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from pretrain.checkpoint import verify
from pretrain.cli.app import app
from pretrain.config.checks.findings import Finding
from pretrain.config.checks.recipe import check_recipe
from tests import commands
from tests.conftest import Run, recipe_tree
from tests.distributed.parity import content, newest

MODEL = {"family": "transformer", "sequence_length": 64, "width": 32, "layers": 2, "heads": 2, "initial_std": 0.02}
FINETUNE = {
    "freeze": ["*"],
    "train": ["stack.norm"],
    "adapters": {"layers": ["*.attention", "*.feed_forward"], "rank": 4},
}


@pytest.fixture(scope="module")
def recipe(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    tree: dict[str, Any] = recipe_tree(corpus_folder) | {"model": MODEL | {"dropout": 0.1}}
    tree["train"] = {"steps": 4, "global_batch": 4, "micro_batch": 2}
    tree["checkpoint"] = {"every": 2}
    tree["validation"]["every"] = 4
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(recipe: Path) -> Path:
    """Return the folder of the runs `base` and `tuned`, which tests only read."""
    root = recipe.parent / "runs"
    for overrides in ([f"run.root={root}", "run.name=base", "train.steps=2"], tuned(root)):
        commands.run(["train", recipe, *overrides], cwd=recipe.parent, check=True, stderr=subprocess.DEVNULL)
    return root


def tuned(root: Path) -> list[str]:
    return [f"run.root={root}", "run.name=tuned", f"initialize.weights={root}/base", f"finetune={json.dumps(FINETUNE)}"]


def invoke(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def validations(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["validation/bits_per_byte"] for record in records if "validation/bits_per_byte" in record]


def test_frozen_weights_are_those_of_the_parent_and_new_adapters_score_alike(runs: Path):
    base, own = (content(newest(runs / name / "checkpoints")) for name in ("base", "tuned"))
    changed = {name.removeprefix("model/") for name, values in base.items() if own.get(name, values) != values}
    assert {name for name in changed if not name.startswith("exp_avg")} == {"stack.norm.weight", "stack.norm.bias"}
    added = {name for name in own if name not in base and name.startswith("model/")}
    assert added == {name for name in own if "adapter" in name and name.startswith("model/")} != set()
    first, last = validations(runs / "tuned")
    assert first == validations(runs / "base")[-1]
    assert last < first


def test_run_of_adapters_resumes_exactly(runs: Path, recipe: Path, byteloom: Run, tmp_path: Path):
    (tmp_path / "runs").mkdir()
    for name in ("base", "tuned"):
        shutil.copytree(runs / name, tmp_path / "runs" / name)
    shutil.rmtree(tmp_path / "runs/tuned/checkpoints/step-00000004")
    overrides = tuned(runs)
    overrides[0] = f"run.root={tmp_path}/runs"
    refused = byteloom("train", recipe, *overrides, "finetune.adapters.alpha=1.0", check=False)
    assert "belongs to a run that trains other parameters (finetune.adapters.alpha" in refused.stderr
    assert "resumes after step 2" in byteloom("train", recipe, *overrides).stderr
    whole, cut = (newest(root / "tuned/checkpoints") for root in (runs, tmp_path / "runs"))
    assert content(whole) == content(cut)
    assert verify(whole).state["lineage"] == verify(cut).state["lineage"]


def test_adapters_are_merged_wherever_the_weights_are_used(runs: Path, corpus_folder: Path, tmp_path: Path):
    out = tmp_path / "export"
    done = CliRunner().invoke(app, ["checkpoint", "export", str(runs / "tuned"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert not [name for name in load_file(out / "model.safetensors") if "adapter" in name]
    last = validations(runs / "tuned")[-1]
    for model in (runs / "tuned", out):
        found = invoke("eval", model, corpus_folder / "validation")["total"]
        assert found["bits_per_byte"] == pytest.approx(last, rel=1e-5)


def test_lineage_names_what_weights_descend_from_with_their_digests(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "export"
    assert CliRunner().invoke(app, ["checkpoint", "export", str(runs / "tuned"), "--out", str(out)]).exit_code == 0
    lines = invoke("checkpoint", "lineage", out)
    assert [(line["name"], line["step"], line["now"]) for line in lines[:2]] == [
        ("base", 2, "unchanged"),
        ("tuned", 4, "unchanged"),
    ]
    assert [line["place"] for line in lines] == [
        *(str(newest(runs / name / "checkpoints")) for name in ("base", "tuned")),
        str(out),
    ]
    monkeypatch.chdir(runs)
    assert invoke("checkpoint", "lineage", "tuned") == lines[:2]  # a relative path is stored as an absolute one
    assert lines[0]["digest"] == verify(newest(runs / "base/checkpoints")).digest
    card = json.loads((out / "card.json").read_text())
    assert [each["digest"] for each in card["lineage"]] == [line["digest"] for line in lines[:2]]
    (out / "card.json").write_text(json.dumps(card | {"lineage": [{**card["lineage"][0], "digest": "blake3:0"}]}))
    assert invoke("checkpoint", "lineage", out)[0]["now"] == "changed"


def test_new_head_is_trained_and_never_frozen_at_first_values(runs: Path, recipe: Path):
    new = ["run.name=new", "model.biases=true", "initialize.partly=true", f"initialize.weights={runs}/base"]

    def found(*section: str) -> list[Finding]:
        return [each for each in check_recipe(recipe, [*new, *section]) if each.field == "initialize.weights"]

    (refused,) = found("finetune.freeze=['*']", "finetune.train=[stack.norm]")
    assert "so finetune.freeze would freeze first values; name it in finetune.train" in refused.text
    assert found("finetune.freeze=['*']", "finetune.train=['*bias']")[0].level == "ok"
