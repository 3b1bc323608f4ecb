"""Recipes found by name, and editable copies of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from byteloom.core.configs import recipe_names
from launchers.slurm.presets import ClusterError, load_cluster
from pretrain.cli.app import app
from pretrain.config.errors import ConfigError
from pretrain.config.loading import load
from pretrain.config.new_recipe import write_copy
from pretrain.config.schema import recipe_schema
from tests.commands import run_here
from tests.test_project import ROOT


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the working directory, and return it."""
    folder = tmp_path / "else where"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def refusal(recipe: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(recipe)
    return str(error.value)


@pytest.mark.slow
def test_every_recipe_is_found_by_name_from_any_folder():
    files = {path.relative_to(ROOT).as_posix() for path in recipe_names().values()}
    assert {"configs/debug.yaml", "configs/megabyte/text.yaml"} <= files
    assert not any("cluster" in path for path in files)
    for name, path in recipe_names().items():
        assert load(name) == load(path)


@pytest.mark.slow
def test_commands_accept_the_name_of_a_recipe():
    shown = CliRunner().invoke(app, ["config", "show", "transformer/debug", "run.name=mine"])
    assert (shown.exit_code, "name: mine" in shown.output) == (0, True)
    estimated = CliRunner().invoke(app, ["models", "estimate", "debug", "--micro-batch", "1"])
    assert (estimated.exit_code, "debug" in estimated.output) == (0, True)
    printed = CliRunner().invoke(app, ["submit", "debug", "run.root=my runs", "--cluster", "cpu", "--dry-run"])
    assert (printed.exit_code, "name: debug" in printed.output) == (0, True)


@pytest.mark.slow
def test_run_is_submitted_from_any_folder_unless_it_was_moved(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    run = elsewhere / "first/runs/mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(load("debug", ["run.name=mine"]).as_yaml())
    words = ("submit", "--cluster", "local", "--dry-run")
    code, output = run_here(*words, run)
    assert code == 0 and f"root: {run.parent} " in " ".join(output.split())  # YAML folds a long path at a space
    moved = run.rename(elsewhere / "first/mine")
    code, output = run_here(*words, moved)
    assert code == 1 and f"error: the recipe of {moved} trains {elsewhere}/runs/mine from here" in output
    assert run_here(*words, moved, f"run.root={moved.parent}")[0] == 0
    moved.rename(run)
    monkeypatch.chdir(elsewhere / "first")
    assert run_here(*words, run)[0] == run_here(*words, "runs/mine")[0] == 0


def test_file_takes_precedence_over_a_recipe_name(elsewhere: Path):
    shutil.copy(ROOT / "configs/demo.yaml", elsewhere / "debug")
    assert load("debug").run.name == "demo"
    (elsewhere / "debug").unlink()
    (elsewhere / "debug").mkdir()  # a folder is not a recipe
    assert load("debug").run.name == "debug"


def test_path_is_never_read_as_a_recipe_name(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(elsewhere))
    for path in ("nowhere.yaml", "../nowhere", f"{elsewhere}/nowhere", "~/nowhere"):
        assert refusal(path) == f"cannot read the recipe {path.replace('~', str(elsewhere))}: No such file or directory"
    shutil.copy(ROOT / "configs/demo.yaml", elsewhere / "mine.yaml")
    assert load("mine.yaml") == load("~/mine.yaml") == load("./mine.yaml") == load("demo")


def test_missing_home_folder_is_named():
    assert refusal("~nobody-here/a.yaml").startswith("~nobody-here/a.yaml: no home folder is known for ~nobody-here")


def test_error_of_an_unknown_name_lists_the_nearest_names(elsewhere: Path):
    lists = "; `byteloom models` lists the names, and a path ends in .yaml"
    assert refusal("debgu") == f"no recipe is named debgu (did you mean debug?){lists}"
    assert refusal("text") == f"no recipe is named text (did you mean megabyte/text or transformer/text?){lists}"
    assert refusal("megabite/text") == f"no recipe is named megabite/text (did you mean megabyte/text?){lists}"
    assert refusal("zzz") == f"no recipe is named zzz{lists}"
    (elsewhere / "mine.yaml").touch()
    assert refusal("mine") == f"no recipe is named mine (did you mean mine.yaml?){lists}"


def test_error_of_a_checkout_path_shows_the_recipe_name():
    for path, name in (("configs/debug.yaml", "debug"), ("megabyte/text.yaml", "megabyte/text")):
        assert refusal(path) == f"there is no file {path}; the recipe that comes with Byteloom is named {name}"


def test_error_of_a_run_folder_shows_its_recipe(elsewhere: Path):
    run = elsewhere / "runs/debug"
    run.mkdir(parents=True)
    assert refusal("runs/debug") == "runs/debug is a folder, not a recipe"
    (run / "config.yaml").touch()
    message = "runs/debug is a folder, not a recipe; the recipe of that run is runs/debug/config.yaml"
    assert refusal("runs/debug") == message


def test_presets_are_found_by_name_from_any_folder(elsewhere: Path):
    assert load_cluster("gpu", {}).gpus == 8
    (elsewhere / "gpu").mkdir()
    assert load_cluster("gpu", {}).gpus == 8
    (elsewhere / "gpu.yaml").write_text("gpus_per_node: 2\n")
    assert load_cluster("gpu.yaml", {}).gpus == 2
    with pytest.raises(
        ClusterError, match=r"^--cluster mine\.yaml: cannot read the preset: No such file or directory$"
    ):
        load_cluster("mine.yaml", {})


def comments(text: str) -> list[str]:
    return [line.partition("#")[2] for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_copy_equals_the_recipe_except_for_its_name_and_fits_the_schema(name: str, elsewhere: Path):
    path = elsewhere / "copies/my first try.yaml"
    schema = write_copy(name, path)
    original, copy = load(name), load(path)
    assert copy.run.name == "my-first-try"
    renamed = original.model_copy(update={"run": original.run.model_copy(update={"name": copy.run.name})})
    assert copy == renamed
    first, second, third = path.read_text().splitlines()[:3]
    assert first == f"# yaml-language-server: $schema={schema.name}"
    assert schema == path.parent / first.partition("=")[2]
    assert second == f"# Made from the recipe {name} by `byteloom config new`."
    assert third == f"# Edit it, then: byteloom train '{path}'"
    body, copied_body = (text.read_text().partition("\n\n")[2] for text in (recipe_names()[name], path))
    assert comments(body) == comments(copied_body)
    validator = jsonschema.Draft202012Validator(json.loads(schema.read_text()))
    assert list(validator.iter_errors(copy.as_tree())) == []


@pytest.mark.slow
def test_copy_drops_comments_that_are_true_only_of_the_original(elsewhere: Path):
    write_copy("megabyte/text", elsewhere / "mine.yaml")
    write_copy("mine.yaml", elsewhere / "copy.yaml")
    text = (elsewhere / "copy.yaml").read_text()
    assert "Printed size" in recipe_names()["megabyte/text"].read_text()
    assert not any(words in text for words in ("Printed size", "Result:", "Weights:"))
    assert "# Task: text.\n" in text
    assert text.count("yaml-language-server") == text.count("Made from") == text.count("Edit it, then") == 1
    write_copy("debug", elsewhere / "debug copy.yaml")
    assert "#   byteloom train '" in (elsewhere / "debug copy.yaml").read_text()


@pytest.mark.parametrize(("file", "run"), [("007", "007"), ("true", "true"), ("1e-3", "1e-3"), ("_ä", "debug")])
def test_run_name_of_a_copy_is_text_in_yaml(elsewhere: Path, file: str, run: str):
    write_copy("debug", elsewhere / f"{file}.yaml")
    assert load(elsewhere / f"{file}.yaml").run.name == run


@pytest.mark.slow
def test_existing_file_is_replaced_only_with_force(elsewhere: Path):
    new = ["config", "new", "mine.yaml"]
    assert CliRunner().invoke(app, new).exit_code == 0
    (elsewhere / "mine.yaml").write_text("mine")
    (elsewhere / "byteloom.schema.json").write_text('{"title": "Byteloom recipe", "of": "an older version"}')
    refused = CliRunner().invoke(app, new)
    assert str(refused.exception) == "mine.yaml exists already; choose another name, or replace it with --force"
    assert (elsewhere / "mine.yaml").read_text() == "mine"
    assert CliRunner().invoke(app, [*new, "--force", "--from", "demo"]).exit_code == 0
    assert load("mine.yaml").model == load("demo").model
    assert json.loads((elsewhere / "byteloom.schema.json").read_text()) == recipe_schema()

    (elsewhere / "byteloom.schema.json").write_text('{"title": "Another"}')
    with pytest.raises(ConfigError, match=r"byteloom\.schema\.json was not written by Byteloom"):
        write_copy("debug", elsewhere / "other.yaml")
    assert not (elsewhere / "other.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("draft", [jsonschema.Draft7Validator, jsonschema.Draft202012Validator])
def test_schema_accepts_every_form_of_a_field_and_refuses_what_the_config_refuses(draft: Any):
    draft.check_schema(recipe_schema())
    validator = draft(recipe_schema())

    def is_accepted(section: str, **fields: object) -> bool:
        tree = load("debug").as_tree()
        tree[section] |= fields
        return validator.is_valid(tree)

    assert is_accepted("engine", activation_checkpointing="full")
    assert is_accepted("engine", activation_checkpointing={"mode": "selective", "stacks": ["global"]})
    assert is_accepted("data", shards=None, mixture={"a": {"shards": "b", "weight": 3}}, stages=[])
    assert is_accepted("checkpoint", keep=None, home="s3://bucket/folder")
    assert is_accepted("optimizer", learning_rate=1)
    assert not is_accepted("engine", activation_checkpointing="some")
    assert not is_accepted("model", pach_size=8)
    assert not is_accepted("model", family="lstm")
    assert not is_accepted("train", steps="50")
    assert not is_accepted("train", steps=0)
    assert not is_accepted("data", mixture={"a": {"weight": 3}})

    tree = load("debug").as_tree()
    del tree["model"]["family"]  # MEGABYTE is the default
    assert validator.is_valid(tree)
    tree = load("transformer/debug").as_tree()
    del tree["model"]["family"]
    assert not validator.is_valid(tree)
