"""`byteloom config check`: its findings, and that it writes nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from pretrain.cli.app import app
from pretrain.config.checks.findings import Finding
from pretrain.config.checks.recipe import check_recipe
from pretrain.config.loading import load
from pretrain.estimate.activations import measure_activations
from pretrain.terminal.progress import size
from pretrain.training.loop import train
from pretrain.training.run_folder import RunFolder
from tests.conftest import recipe_tree
from tests.s3 import faulty_proxy, s3_server


@pytest.fixture(scope="module")
def trained(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recipe of a run that has done four of twelve steps, whose folder tests only read."""
    folder = tmp_path_factory.mktemp("checked")
    tree = recipe_tree(corpus_folder)
    tree["run"] = {"name": "run", "root": str(folder / "runs")}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    assert train(load(recipe, ["train.steps=4", "validation.shards=null"])) == 0
    return recipe


def found(recipe: Path, *overrides: str, level: str) -> list[Finding]:
    """Return the findings of a level, and check that nothing is written."""
    files = {path: path.stat().st_mtime_ns for path in recipe.parent.rglob("*")}
    findings = check_recipe(recipe, overrides)
    assert files == {path: path.stat().st_mtime_ns for path in recipe.parent.rglob("*")}
    return [finding for finding in findings if finding.level == level]


def errors(recipe: Path, *overrides: str) -> dict[str, str]:
    return {finding.field: finding.text for finding in found(recipe, *overrides, level="error")}


def warnings(recipe: Path, *overrides: str) -> dict[str, str]:
    return {finding.field: finding.text for finding in found(recipe, *overrides, level="warning")}


def test_check_describes_a_valid_recipe(recipe: Path):
    texts = [finding.text for finding in found(recipe, f"run.root={recipe.parent}/runs", level="ok")]
    assert texts[0] == "the recipe is valid"
    for part in (
        "data.shards: ",
        "128 bytes per epoch; the run reads 0.0",
        "scored every 6 steps",
        "run.name: a new run; ",
        "runs/run can be made",
        "engine.device: this machine's CPU, in one process",
        "engine.precision: fp32",
        "model: megabyte, ",
        "checkpoint.keep: 3 checkpoints of ",
        "train.micro_batch: a micro-batch of 4: ",
    ):
        assert any(part in text for text in texts), (part, texts)


@pytest.mark.slow
def test_command_prints_text_and_json(recipe: Path):
    text = CliRunner().invoke(app, ["config", "check", str(recipe), "optimizer.learning_rate=3e3"])
    assert text.exit_code == 0
    assert "\nwarning  optimizer.learning_rate is 3000, and " in text.stdout
    assert text.stderr.endswith("0 errors, 2 warnings\n")
    output = CliRunner().invoke(app, ["config", "check", str(recipe), "data.shards=nowhere", "--json"])
    assert output.exit_code == 1
    (error,) = (finding for finding in json.loads(output.stdout) if finding["level"] == "error")
    assert error["field"] == "data.shards" and "no corpus at nowhere" in error["text"]


def test_all_faults_of_a_recipe_are_found(recipe: Path):
    assert errors(recipe, "train.steps=many", "optimizer.clip_norm=1e999", "modle=3").keys() == {
        "train.steps",
        "optimizer.clip_norm",
        "modle",
    }


def test_faults_of_folders_and_devices_are_found_together(recipe: Path):
    file = str(recipe)
    assert errors(
        recipe,
        "data.shards=nowhere",
        "validation.shards=nowhere",
        "initialize.weights=nowhere",
        f"run.root={file}/runs",
        f"checkpoint.home={file}/home",
        "engine.device=cuda",
    ).keys() >= {"data.shards", "validation.shards", "initialize.weights", "run.root", "checkpoint.home"}


@pytest.mark.slow
def test_unreadable_bucket_is_an_error_without_findings_about_its_content(recipe: Path):
    with s3_server("bucket"), faulty_proxy(lambda path, credentials: "denied"):
        findings = check_recipe(recipe, ["checkpoint.home=s3://bucket/home"])
    assert [finding.field for finding in findings if finding.level == "error"] == ["checkpoint.home"]
    assert not [finding for finding in findings if finding.field == "run.name"]


@pytest.mark.slow
def test_unwritable_folder_is_an_error(recipe: Path):
    """/proc refuses new files even for root."""
    assert "checkpoint.keep" in errors(recipe, "run.root=/proc/runs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "field", "text"),
    [
        (["model.patch_size=8"], "run.name", "has a run of another model (model.patch_size: 4 -> 8)"),
        (["data.seed=3"], "run.name", "has a run that reads other bytes (data.seed: 0 -> 3)"),
        (["optimizer.scaling=mup", "optimizer.base={dropout: 0.1}"], "run.name", "belongs to a run with other scales"),
        (["optimizer.name=adam"], "run.name", "has the moments of optimizer.name=adamw, not of adam"),
    ],
)
def test_run_that_the_recipe_cannot_resume_is_an_error(trained: Path, overrides: list[str], field: str, text: str):
    assert text in errors(trained, *overrides)[field]


@pytest.mark.slow
def test_finding_of_a_resumable_run_shows_its_step_and_changes(trained: Path):
    texts = [finding.text for finding in found(trained, "initialize.weights=nowhere", level="ok")]
    assert any("run.name: resumes after step 4 of 12, from " in text for text in texts)
    assert "changed since step 4: train.steps: 4 -> 12" in texts
    assert "initialize.weights: not read, because the run has a checkpoint of its own" in texts
    assert "nothing is left to train" in warnings(trained, "train.steps=4")["train.steps"]


@pytest.mark.slow
def test_run_that_another_process_trains_is_an_error(trained: Path):
    with RunFolder(trained.parent / "runs/run").locked():
        assert "is training in" in errors(trained)["run.name"]


@pytest.mark.slow
def test_damaged_record_of_a_run_is_an_error(trained: Path, tmp_path: Path):
    shutil.copytree(trained.parent / "runs", tmp_path / "runs")
    (tmp_path / "recipe.yaml").write_bytes(trained.read_bytes())
    (tmp_path / "runs/run/run.json").write_bytes(b"")
    damaged = found(tmp_path / "recipe.yaml", f"run.root={tmp_path}/runs", level="error")
    assert [finding.field for finding in damaged] == ["run.name"]
    assert "run.json is damaged" in damaged[0].text


def test_damaged_checkpoints_are_skipped(trained: Path, tmp_path: Path):
    shutil.copytree(trained.parent / "runs", tmp_path / "runs")
    (tmp_path / "recipe.yaml").write_bytes(trained.read_bytes())
    (tmp_path / "runs/run/checkpoints/step-00000004/metadata.json").write_text("{")
    text = warnings(tmp_path / "recipe.yaml", f"run.root={tmp_path}/runs")["run.name"]
    assert "step-00000004 is not valid" in text and "a start would set it aside" in text


@pytest.mark.slow
def test_weights_of_another_run_are_checked(trained: Path):
    texts = [
        f.text for f in found(trained, "run.name=new", f"initialize.weights={trained.parent}/runs/run", level="ok")
    ]
    assert any(text.startswith("initialize.weights: 43 tensors of ") for text in texts)
    refused = errors(trained, "run.name=new", f"initialize.weights={trained.parent}/runs/run", "model.patch_size=8")
    assert "belongs to another model" in refused["initialize.weights"]


@pytest.mark.slow
def test_run_too_large_for_the_machine_is_an_error(recipe: Path, corpus_folder: Path):
    assert "it cannot be built" in errors(recipe, "model.global_model.width=1000000000")["model"]
    large = ("model.global_model.width=65536", "model.local_model.width=16384")
    assert "which is too much" in errors(recipe, *large)["train.micro_batch"]
    assert "share" in warnings(recipe, "launch.processes=1000")["launch.processes"]
    assert "1 of 3 ranks are idle" in warnings(recipe, "launch.processes=3")["train.global_batch"]
    assert "set launch.processes, or use a launcher" in warnings(recipe, "engine.name=zero1")["engine.name"]
    shards = ("engine.name=hsdp", "engine.shards=2", "launch.processes=3")
    assert "engine.shards is 2, which does not divide the 3 ranks" in errors(recipe, *shards)["engine.name"]
    assert "validation.shards" in warnings(recipe, f"validation.shards={corpus_folder}/train")
    assert "are fewer than train.global_batch" in warnings(recipe, "train.global_batch=100000")["data.shards"]


@pytest.mark.slow
def test_memory_of_a_step_is_that_of_a_rank_which_shares_rows(recipe: Path):
    shared = ("engine.context=2", "launch.processes=2")
    config = load(recipe, shared)
    activations = measure_activations(config.model, config.train.micro_batch, torch.float32, context=2).peak
    texts = [finding.text for finding in found(recipe, *shared, level="ok")]
    assert any(f"a micro-batch of 4: {size(activations)} of activations" in text for text in texts)


def test_each_source_of_a_mixture_is_checked(recipe: Path, corpus_folder: Path):
    mixture = f"data={{mixture: {{a: {{shards: {corpus_folder}/train}}, b: {{shards: nowhere}}}}}}"
    assert errors(recipe, mixture).keys() == {"data.mixture.b.shards"}


@pytest.mark.slow
def test_run_logs_the_warnings_of_its_recipe_at_startup(recipe: Path, tmp_path: Path):
    few = ("train.steps=3", "validation.shards=null", f"run.root={tmp_path}", "optimizer.epsilon=2")
    assert train(load(recipe, few)) == 0
    assert (
        "WARNING optimizer.epsilon is 2, and few models train with more than 1"
        in (tmp_path / "run/train.log").read_text()
    )
