"""Words of `sweep` and `compare`, and the grid that overrides with several values make."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.errors import ConfigError
from pretrain.config.loading import load
from pretrain.experiments.grid import grid, values_of, with_family
from pretrain.experiments.words import read_words


def test_grid_has_one_run_per_combination_of_values():
    points = grid(["a.lr=1e-3,3e-4", "b.betas=[0.9,0.95],[0.9,0.99]", "c.x=1", "d.lr=2,3"])
    assert len(points) == 8
    assert next(iter(points.values())) == ["a.lr=1e-3", "b.betas=[0.9,0.95]", "c.x=1", "d.lr=2"]
    assert next(iter(points)) == "a.lr-1e-3-betas-0.9_0.95-d.lr-2"


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["a.b=1", "a.b=3"], "given twice"),
        (["a.b"], "not of the form"),
        (["a.b=1,,2"], "has an empty value between two commas"),
        (["a.b=x/y,x_y"], "two runs of the sweep would have the same name"),
    ],
)
def test_invalid_grid_is_refused(overrides: list[str], fault: str):
    with pytest.raises(ConfigError, match=fault):
        grid(overrides)


STACKS = "engine.activation_checkpointing.stacks"


@pytest.mark.parametrize(
    ("field", "text", "values"),
    [
        ("optimizer.learning_rate", "[1e-3, 3e-3]", ["1e-3", "3e-3"]),
        ("model.patch_size", "[4]", ["4"]),
        (STACKS, "[global,local]", ["[global,local]"]),
        (STACKS, "[global,local],[local]", ["[global,local]", "[local]"]),
        (STACKS, "[[global,local],[local],[]]", ["[global,local]", "[local]", "[]"]),
        ("optimizer.options", "{a: [1, 2]}", ["{a: [1, 2]}"]),
        ("data.stages", "[{step: 1, weights: {a: 1, b: 2}}]", ["[{step: 1, weights: {a: 1, b: 2}}]"]),
        ("their.field", "[1,2]", ["[1,2]"]),
        ("run.name", "'a,b',\"c\"", ["'a,b'", '"c"']),
    ],
)
def test_list_is_one_value_only_for_a_field_that_takes_a_list(field: str, text: str, values: list[str]):
    assert values_of(field, text) == values


JSON_VALUES = st.recursive(
    st.integers() | st.booleans() | st.text(st.characters(codec="ascii", exclude_characters='"\\'), min_size=1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(JSON_VALUES, min_size=2, max_size=4))
def test_values_of_any_shape_are_separated_where_they_were_joined(values: list[object]):
    texts = [json.dumps(value) for value in values]
    assert values_of("their.field", ",".join(texts)) == texts


def test_family_axis_keeps_the_fields_that_both_families_have():
    points = grid(["model.family=megabyte,transformer", "model.width=48", "model.layers=1", "model.heads=2"])
    assert list(points) == ["family-megabyte", "family-transformer"]
    model = load("debug", with_family("debug", points["family-transformer"])).model
    before = load("debug").model
    assert (model.family, model.width, model.sequence_length) == ("transformer", 48, before.sequence_length)
    assert model.dropout == before.dropout and not hasattr(model, "patch_size")


def test_sections_are_named_by_their_families_if_these_differ():
    sections = "model={family: transformer, width: 8},{family: megabyte}"
    assert list(grid([sections])) == ["model-transformer", "model-megabyte"]


def test_words_are_recipes_and_overrides_for_all_or_for_one():
    words = ["debug", "wide=transformer/debug", "model={a: 1}", "wide:model.width=96", "train.global_batch=8"]
    one, two = read_words(words).entries
    assert (one.name, one.recipe, one.overrides) == ("debug", "debug", ("model={a: 1}", "train.global_batch=8"))
    assert (two.name, two.recipe) == ("wide", "transformer/debug")
    assert two.overrides == ("model={a: 1}", "train.global_batch=8", "model.width=96")
    assert read_words(["transformer/debug"]).entries[0].name == "transformer-debug"


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["train.seed=1"], "there is no recipe"),
        (["debug", "debug"], "two recipes have the name debug; name one of them: OTHER=debug"),
        (["debug", "wid:train.seed=1"], "wid:train.seed=1 is for a recipe wid, which is not given"),
        (["transfomer/debug"], "transformer/debug"),
        (["wide=nothing"], "nothing"),
    ],
)
def test_wrong_words_are_refused_by_name(words: list[str], fault: str):
    with pytest.raises(ConfigError, match=fault):
        read_words(words)
