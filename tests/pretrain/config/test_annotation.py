"""Recipes with a comment on each line, generated from the config."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from byteloom.core.configs import recipe_names
from pretrain.cli.app import app
from pretrain.config.annotation import LINE_LENGTH, annotated, debug_recipes, rewritten, summary
from pretrain.config.fields import all_fields
from pretrain.config.loading import load
from pretrain.config.schema import Config
from pretrain.models import all_families
from tests.test_project import ROOT

LONGEST_SUMMARY = 82
"""Characters of a comment that fits in one line beside most fields."""


@pytest.mark.parametrize("path", debug_recipes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_debug_recipe_is_the_generated_text(path: Path):
    assert path.read_text(encoding="utf-8") == rewritten(path), "run `make recipes`"


def test_every_family_has_a_debug_recipe():
    assert {load(path).model.family for path in debug_recipes()} == {*all_families()}


def test_first_sentence_of_every_field_is_short():
    fields = {".".join(path): field for path, field in all_fields(Config, ())}
    lengths = {name: len(summary(field.description or "")) for name, field in fields.items()}
    assert {name: length for name, length in lengths.items() if not 0 < length <= LONGEST_SUMMARY} == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_annotated_recipe_loads_to_the_same_config_and_explains_every_line(name: str, tmp_path: Path):
    config = load(name)
    text = annotated(config)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert load(path) == config
    lines = text.splitlines()
    assert all("# " in line for line in lines if line)
    assert max(map(len, lines)) <= LINE_LENGTH


def test_config_show_explains_an_overridden_recipe():
    printed = CliRunner().invoke(app, ["config", "show", "debug", "train.steps=70", "--explain"]).stdout
    assert yaml.safe_load(printed)["train"]["steps"] == 70
    assert "# Optimizer steps of the whole run." in printed
    mixture = "data.mixture={books: {shards: a, weight: 3}, code: {shards: b, weight: 1}}"
    printed = CliRunner().invoke(app, ["config", "show", "debug", "data.shards=null", mixture, "--explain"]).stdout
    assert yaml.safe_load(printed)["data"]["mixture"]["books"]["weight"] == 3
