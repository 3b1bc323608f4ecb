"""Registry of model families: names, declarations and entry points of other packages."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

import pretrain.models
from byteloom.core.registries.registry import RegistryError
from pretrain.models import FamilyError, all_families, family, model_config, with_usage_options
from pretrain.models.families.transformer import Transformer, TransformerConfig
from pretrain.models.registry import PACKAGE, Family, UsageOption, register_family

ROOT = Path(__file__).parents[3]

GOOD = """
from typing import Literal
from pretrain.models import Family, UsageOption, register_family
from pretrain.models.families.transformer import Transformer, TransformerConfig

class TheirConfig(TransformerConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    '''Their model.'''

    family: Literal["theirs"] = "theirs"
    '''Which model.'''

option = UsageOption("view", "window", "Positions that a byte sees.")
register_family(Family(name="theirs", config=TheirConfig, build=Transformer, usage_options=(option,)))
"""


def run_with(folder: Path, script: str, entries: dict[str, str], modules: dict[str, str]) -> str:
    """Return the output of a script in a process in which packages declare entry points, one package each."""
    for number, (name, value) in enumerate(entries.items()):
        info = folder / f"package_{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: package-{number}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[byteloom.families]\n{name.strip()} = {value}\n")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_every_module_of_the_package_registers_a_family():
    modules = {path.stem for path in (ROOT / "pretrain/models/families").glob("*.py")} - {"__init__"}
    own = {name for name, entry in all_families().items() if entry.config.__module__.startswith(f"{PACKAGE}.")}
    assert own == modules


@pytest.mark.slow
def test_a_family_of_another_package_is_found_by_its_entry_point(tmp_path: Path):
    script = """
from pathlib import Path
from pretrain.config.schema import Config
from pretrain.models import build_model, all_families, model_config
config = model_config({"family": "theirs", "sequence_length": 8, "width": 8, "layers": 1, "heads": 1})
print(type(config).__name__, type(build_model(config)).__name__)
print(*all_families(), list(Config.model_json_schema()["$defs"]))
from pretrain.cli.app import app
from typer.testing import CliRunner
print(CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200"}).output)
"""
    printed = run_with(tmp_path, script, {"theirs": "their_model"}, {"their_model": GOOD})
    assert printed.startswith(f"TheirConfig Transformer\n{' '.join(all_families())} theirs")
    assert "'TheirConfig'" in printed
    assert "theirs: Positions that a byte sees. Default: as in the run." in printed


@pytest.mark.slow
def test_module_of_another_package_can_be_imported_first(tmp_path: Path):
    script = "import their_model; from pretrain.models import family; print(family('theirs').build.__name__)"
    printed = run_with(tmp_path, script, {"theirs": "their_model"}, {"their_model": GOOD})
    assert printed == "Transformer\n"


@pytest.mark.slow
def test_broken_entry_point_is_an_error_only_of_its_family(tmp_path: Path):
    script = """
from byteloom.core.registries.registry import RegistryError
from pretrain.models import all_families, family, model_config
print(family("transformer").name)
for use in (lambda: family("theirs"), lambda: model_config({"family": "theirs"})):
    try:
        use()
    except RegistryError as error:
        print(error)
print(len(all_families()))
"""
    printed = run_with(tmp_path, script, {"theirs": "their_model"}, {"their_model": "import missing_package"})
    fault = (
        "the entry point theirs = their_model of package-0 (group byteloom.families) cannot be imported: "
        "ModuleNotFoundError: No module named 'missing_package'"
    )
    assert printed.splitlines() == ["transformer", fault, fault, str(len(all_families())), fault]


@pytest.mark.slow
def test_names_of_entry_points_are_unique_and_equal_the_names_of_their_families(tmp_path: Path):
    """Each fault affects only its family: a name of Byteloom, a name in two packages, and a wrong name."""
    script = """
from byteloom.core.registries.registry import RegistryError
from pretrain.models import family
for name in ("transformer", "theirs", "other", "megabyte"):
    try:
        print(family(name).name)
    except RegistryError as error:
        print(error)
"""
    entries = dict.fromkeys(("transformer", "theirs", "theirs ", "other"), "their_model")
    assert run_with(tmp_path, script, entries, {"their_model": GOOD}).splitlines() == [
        "the entry point transformer = their_model of package-0 (group byteloom.families) has the name of another "
        "model family; rename one",
        "package-1 and package-2 both have a model family named theirs (group byteloom.families); remove one",
        "the entry point other = their_model of package-3 (group byteloom.families) registers no model family "
        "named other",
        "megabyte",
    ]


def test_no_name_in_the_package_equals_the_name_of_a_module_in_it():
    """Importing a module sets it as an attribute of its package, in place of any other object of that name."""
    modules = {module.name for module in pkgutil.iter_modules(pretrain.models.__path__)}
    assert not modules & set(pretrain.models.__all__)


def test_an_unknown_family_is_refused_with_the_nearest_name():
    with pytest.raises(
        RegistryError, match=r"transformr is not the name of a model family \(did you mean transformer\?\)"
    ):
        family("transformr")
    with pytest.raises(ValidationError, match="union_tag_invalid"):
        model_config({"family": "transformr"})


def test_a_name_is_registered_once():
    with pytest.raises(RegistryError, match="the model family transformer is registered twice"):
        register_family(Family(name="transformer", config=TransformerConfig, build=Transformer))


class Nameless(BaseModel):
    """A config that does not belong to a family."""

    sequence_length: int


@pytest.mark.parametrize(
    ("declared", "fault"),
    [
        ({"config": Nameless}, 'has no field family: Literal."transformer". = "transformer"'),
        ({"free_fields": frozenset({"drop"})}, "free_fields of the model family transformer: .* has no field drop"),
        (
            {"usage_options": (UsageOption("latents", "latents", "Latents."),)},
            "usage_options of the model family transformer: .* has no field latents",
        ),
        (
            {"usage_options": (UsageOption("size", "positions", "Positions."),)},
            r"usage_options of the model family transformer: .*\.positions is not of type int, float, str or bool",
        ),
    ],
)
def test_a_wrong_declaration_is_refused(declared: dict[str, object], fault: str):
    with pytest.raises(FamilyError, match=fault):
        register_family(Family(**{"name": "transformer", "config": TransformerConfig, "build": Transformer} | declared))


def test_only_fields_that_no_parameter_depends_on_change_with_the_usage():
    stack = {"width": 8, "layers": 1, "heads": 1}
    few = model_config(
        {"family": "perceiver_ar", "sequence_length": 16, "latents": 4, "latent_model": stack, "cross_heads": 1}
    )
    assert with_usage_options(few, {"latents": 8}).model_dump() == few.model_dump() | {"latents": 8}
    with pytest.raises(FamilyError, match=r"^--latents 17: latents \(17\) are more than sequence_length \(16\)$"):
        with_usage_options(few, {"latents": 17})
    plain = model_config({"family": "transformer", "sequence_length": 16} | stack)
    with pytest.raises(FamilyError, match=r"^a transformer model takes no --latents; it takes no such option$"):
        with_usage_options(plain, {"latents": 8})
