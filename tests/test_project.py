"""Rules of the project."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from byteloom.core.configs import recipe_files
from pretrain.config.fields import all_fields
from pretrain.config.loading import load
from pretrain.config.schema import Config

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_packages_import_only_what_their_layer_allows():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "needless"),
    [
        ("import pretrain.cli.entry, pretrain.cli.corpora.prepare", {"torch"}),
        ("import pretrain.cli.entry, pretrain.cli.runs.status", {"torch"}),
        ("import pretrain.cli.entry, pretrain.cli.runs.report", {"torch", "matplotlib"}),
        ("import pretrain.cli.entry, pretrain.cli.train", {"pretrain.report", "byteloom.model", "byteloom.stream"}),
        (
            "import pretrain.cli.models.evaluate, pretrain.cli.train, torch\n"
            "from tests.distributed.parity import FAMILIES, model; [*map(model, FAMILIES)]",
            {"torch._dynamo", "torch.distributed.fsdp", "deepspeed", "mlflow", "matplotlib"},
        ),
    ],
    ids=["a corpus", "a run", "a report", "training", "a model"],
)
def test_commands_do_not_import_slow_packages_they_do_not_need(command: str, needless: set[str]):
    script = f"import sys; {command}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not needless & set(loaded.stdout.split())


def test_debug_recipes_list_every_field():
    paths = list((ROOT / "configs").rglob("debug.yaml"))
    lines = [line for path in paths for line in path.read_text().splitlines()]
    named = {line.split(":")[0].strip() for line in lines if ":" in line}
    assert {field[-1] for field, _ in all_fields(Config, ())} <= named


def test_lock_file_pins_every_dependency_except_wandb():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "wandb"}
    required = [*project["dependencies"], *(each for extra in extras.values() for each in extra)]
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert {re.split(r"[<>=\[]", name)[0].lower().replace("_", "-") for name in required} <= pinned


def test_dependency_ranges_start_at_the_oldest_version_and_contain_the_locked_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {canonicalize_name(each.name): each.specifier for each in map(Requirement, project["dependencies"])}
    locked, oldest = pins("requirements.lock"), pins("requirements-oldest.txt")
    assert required.keys() == oldest.keys()
    for name, versions in required.items():
        ends = {each.operator: Version(each.version) for each in versions}
        assert ends.keys() == {">=", "<"}, name
        assert ends[">="] == oldest[name], name
        assert locked[name] in versions, name
    assert SpecifierSet(project["requires-python"]) == SpecifierSet(">=3.11,<3.14")


def pins(name: str) -> dict[str, Version]:
    """Return the versions that a file pins, by package."""
    lines = (line.partition("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
    return {canonicalize_name(package): Version(version) for package, _, version in lines}


@pytest.mark.slow
def test_every_recipe_loads():
    recipes = recipe_files(ROOT / "configs")
    assert recipes
    for recipe in recipes:
        load(recipe)


def test_every_config_field_has_a_description():
    undescribed = [".".join(path) for path, field in all_fields(Config, ()) if not field.description]
    assert not undescribed
