"""The project's own rules."""

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


def test_walls_between_packages_stand():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("command", "needless"),
    [
        ("import pretrain.cli.entry, pretrain.cli.corpora", {"torch"}),
        ("import pretrain.cli.entry, pretrain.cli.runs", {"torch"}),
        (
            "import pretrain.cli.app, torch\n"
            "from tests.distributed.parity import FAMILIES, model; [*map(model, FAMILIES)]",
            {"torch._dynamo", "torch.distributed.fsdp", "deepspeed", "mlflow", "matplotlib"},
        ),
    ],
    ids=["a corpus", "a run", "a model"],
)
def test_what_takes_seconds_to_import_is_not_where_it_is_not_needed(command: str, needless: set[str]):
    script = f"import sys; {command}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not needless & set(loaded.stdout.split())


def test_debug_recipes_name_every_field_and_explain_every_line():
    paths = list((ROOT / "configs").rglob("debug.yaml"))
    lines = [line for path in paths for line in path.read_text().splitlines()]
    silent = [line for line in lines if line and "#" not in line]
    assert not silent
    named = {line.split(":")[0].strip() for line in lines if ":" in line}
    assert {field[-1] for field, _ in all_fields(Config, ())} <= named


def test_the_lock_pins_everything_that_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert {re.split(r"[<>=\[]", name)[0].lower().replace("_", "-") for name in asked} <= pinned


def test_every_range_of_a_dependency_begins_with_the_oldest_version_and_holds_the_locked_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {canonicalize_name(each.name): each.specifier for each in map(Requirement, project["dependencies"])}
    locked, oldest = pins("requirements.lock"), pins("requirements-oldest.txt")
    assert asked.keys() == oldest.keys()
    for name, versions in asked.items():
        ends = {each.operator: Version(each.version) for each in versions}
        assert ends.keys() == {">=", "<"}, name
        assert ends[">="] == oldest[name], name
        assert locked[name] in versions, name
    assert SpecifierSet(project["requires-python"]) == SpecifierSet(">=3.11,<3.14")


def pins(name: str) -> dict[str, Version]:
    """Return the versions that a file pins, by package."""
    lines = (line.partition("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
    return {canonicalize_name(package): Version(version) for package, _, version in lines}


def test_every_recipe_loads():
    recipes = recipe_files(ROOT / "configs")
    assert recipes
    for recipe in recipes:
        load(recipe)


def test_every_config_field_has_a_meaning():
    silent = [".".join(path) for path, field in all_fields(Config, ()) if not field.description]
    assert not silent
