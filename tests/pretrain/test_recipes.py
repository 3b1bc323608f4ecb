"""What recipes build, told without building it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain.cli import app
from pretrain.config import ConfigError, load
from pretrain.models import build_model, families
from pretrain.recipes import RecipeSize, recipe_sizes
from tests.test_project import ROOT


@pytest.fixture(scope="module")
def sizes() -> dict[str, RecipeSize]:
    folder = ROOT / "configs"
    return {size.path.relative_to(folder).with_suffix("").as_posix(): size for size in recipe_sizes(folder)}


def test_every_family_has_a_debug_recipe_of_the_size_that_is_built(sizes: dict[str, RecipeSize]):
    debug = {size.family: size for name, size in sizes.items() if name.endswith("debug")}
    assert debug.keys() == families().keys()
    for size in debug.values():
        assert build_model(load(size.path).model).parameter_count() == size.parameters


@pytest.mark.parametrize(
    ("name", "parameters", "printed"),
    [
        ("perceiver_ar/imagenet64", 770.1e6, "770.1M"),  # arXiv:2202.07765
        ("transformer_xl/enwik8-12-layers", 41e6, "41M"),  # arXiv:1901.02860, table 2
        ("transformer_xl/enwik8-24-layers", 277e6, "277M"),
        ("megabyte/text", 704.6e6 + 226.5e6, "758M + 262M"),  # 12 L D^2; the paper's names are larger
        ("transformer/text", 276.8e6, "320M"),
        ("megabyte/books-10m", 10e6, None),
    ],
)
def test_the_papers_models_have_the_papers_sizes(
    sizes: dict[str, RecipeSize], name: str, parameters: float, printed: str | None
):
    assert sizes[name].parameters == pytest.approx(parameters, rel=0.01)
    assert sizes[name].printed == printed


def test_megabytes_text_model_and_its_transformer_cost_the_same_a_byte(sizes: dict[str, RecipeSize]):
    """The paper's control: 645M and 646M by SpaceByte's count (arXiv:2404.14408) over 12 L D^2 weights."""
    assert sizes["megabyte/text"].flops_per_byte == pytest.approx(645e6, rel=0.005)
    assert sizes["transformer/text"].flops_per_byte == pytest.approx(646e6, rel=0.005)


def test_the_models_command_lists_every_family_and_recipe(sizes: dict[str, RecipeSize]):
    shown = CliRunner().invoke(app, ["models", str(ROOT / "configs")], env={"COLUMNS": "200"}, catch_exceptions=False)
    for family in families():
        assert f"{family}: " in shown.output
    for name, size in sizes.items():
        (line,) = (line for line in shown.output.splitlines() if f" {name}.yaml " in line)
        assert f"{size.parameters:,}" in line
        assert (size.printed or "") in line


def test_a_folder_without_recipes_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no recipe"):
        recipe_sizes(tmp_path)
