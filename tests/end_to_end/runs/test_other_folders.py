"""Commands in another folder than that in which a run was started: relative paths lead from the latter."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from byteloom.core.storage.locations import LocationText, expand_home
from pretrain.config.loading import load
from pretrain.config.schema import Config
from pretrain.models.patching.entropy import EntropyConfig
from pretrain.training.loop import train
from pretrain.training.run_folder import PATHS, RunFolder, as_started
from tests.commands import run_here
from tests.conftest import recipe_tree


@pytest.fixture(params=["relative", "absolute"])
def runs(request: pytest.FixtureRequest, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the root of a run that was started in tmp_path / "here", with relative paths; be in tmp_path / "there"."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here/library").symlink_to(corpus_folder)
    (tmp_path / "here/prompt").write_bytes(b"once upon")
    tree: Any = recipe_tree(corpus_folder)
    root = "runs" if request.param == "relative" else str(tmp_path / "runs")
    tree["run"] = {"root": root, "name": "run"}
    tree["data"]["shards"] = "library/train"
    tree["validation"] = {"corpora": {"books": "library/validation"}, "every": 100}
    tree["train"]["steps"] = 2
    tree["checkpoint"] = {"every": 1, "home": "home"}
    tree["samples"] = {"files": ["prompt"], "held_out": 1, "bytes": 4}
    (tmp_path / "here/recipe.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path / "here")
    assert train(load("recipe.yaml")) == 0
    monkeypatch.chdir(tmp_path / "there")
    return tmp_path / "here/runs" if request.param == "relative" else tmp_path / "runs"


def succeed(*arguments: object) -> str:
    code, output = run_here(*arguments)
    assert code == 0, output
    return output


@pytest.mark.slow
def test_commands_find_what_a_run_named_by_relative_paths_from_any_folder(runs: Path):
    run = runs / "run"
    scored = json.loads(succeed("eval", run, "--json"))["total"]["bits_per_byte"]
    assert "2 samples" in succeed("samples", run)
    succeed("checkpoint", "verify", run)
    succeed("inspect", run, "--replay")
    succeed("report", run)
    succeed("train", run / "config.yaml", "train.steps=3", "optimizer.schedule.shape=constant")
    assert RunFolder(run).stored_identity()["started_in"] == str(Path.cwd())  # type: ignore[index]
    succeed("branch", run, "--step", 2, "--name", "branch", "train.steps=3")
    succeed("train", runs / "branch/config.yaml")
    exported = runs / "export"
    succeed("checkpoint", "export", run, "--out", exported)
    assert json.loads(succeed("eval", exported, "--json"))["total"]["bits_per_byte"] != scored  # of one more step
    assert not list(Path.cwd().glob("runs*")) and not list(Path.cwd().glob("home"))


def test_paths_of_a_moved_run_lead_from_the_working_directory(tmp_path: Path):
    tree = {"run": {"root": "runs"}, "data": {"shards": "books"}}
    (tmp_path / "books").mkdir()
    assert as_started(tree, tmp_path / "runs/run")["data"]["shards"] == str(tmp_path / "books")
    assert as_started(tree, tmp_path / "elsewhere/run") == tree
    shutil.rmtree(tmp_path / "books")
    assert as_started(tree, tmp_path / "runs/run") == tree


def locations(node: type[BaseModel], place: str = "") -> Iterator[str]:
    """Yield the places of a config's paths, with * for the names of a mapping and the items of a list."""
    for name, field in node.model_fields.items():
        yield from _locations(field, field.annotation, f"{place}{name}")


def _locations(field: FieldInfo | None, kind: Any, place: str) -> Iterator[str]:
    marks = [*(field.metadata if field else ()), *getattr(kind, "__metadata__", ())]
    if any(getattr(mark, "func", None) is expand_home for mark in marks) or kind is LocationText:
        yield place
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from locations(kind, f"{place}.")
    else:
        inner = [each for each in getattr(kind, "__args__", ()) if each is not Ellipsis]
        origin = getattr(kind, "__origin__", None)
        for each in inner[1:] if origin is dict else inner:
            yield from _locations(None, each, f"{place}.*" if origin in (dict, tuple, list) else place)


def test_every_path_of_a_recipe_leads_from_the_folder_of_the_start():
    found = {*locations(Config), *(f"model.patcher.{name}" for name in locations(EntropyConfig))}
    assert found == {*PATHS} - {"validation.corpora.*"}  # a name alone, which stands for its shards
