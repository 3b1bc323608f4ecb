"""Grid of a sweep: overrides with several values ─▶ the overrides of each point, by a name.

train.seed=0,1                              two values
optimizer.learning_rate=[1e-3,3e-4]         the same for a field that takes no list
engine.activation_checkpointing.stacks=[global,local],[local]     two lists
model={family: transformer, width: 64, …},{family: megabyte, …}   two sections
model.family=megabyte,transformer           two families, with the fields that both have
"""

import itertools
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from pretrain.config.errors import ConfigError
from pretrain.config.fields import nodes_at
from pretrain.config.loading import load
from pretrain.config.recipe_yaml import RecipeLoader
from pretrain.models import all_families

FAMILY = "model.family"
BRACKETS = {"[": "]", "{": "}"}


def grid(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides of each point of a grid, by the suffix of the run's name that shows its values.

    The suffix is empty if no field has several values.

    Raises:
        ConfigError: an override is malformed, a field is given twice, or two points would share a name.
    """
    axes = {field: values_of(field, text) for field, _, text in (override.partition("=") for override in overrides)}
    if len(axes) < len(overrides):
        raise ConfigError("a field is given twice; give all its values in one override, such as train.seed=0,1")
    varied = [field for field, values in axes.items() if len(values) > 1]
    short = {field: field.rpartition(".")[2] for field in varied}
    clear = {field: last if list(short.values()).count(last) == 1 else field for field, last in short.items()}
    shown = {field: dict(zip(axes[field], _names(axes[field]), strict=True)) for field in varied}
    points: dict[str, list[str]] = {}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        name = "-".join(f"{clear[field]}-{shown[field][point[field]]}" for field in varied)
        if name in points:
            raise ConfigError(
                f"two runs of the sweep would have the same name, which ends in {name}; change one of the values"
            )
        points[name] = [f"{field}={value}" for field, value in point.items()]
    return points


def values_of(field: str, text: str) -> list[str]:
    """Return the values of an override as text. Commas within brackets or quotes do not separate values.

    A list is several values if the field takes no list, or a list of lists.

    Raises:
        ConfigError: the field or a value is empty.
    """
    values = list(_pieces(text)) if text else []
    if not field or not values:
        raise ConfigError(f"override {field!r}={text!r} is not of the form section.field=value,value")
    if len(values) == 1 and values[0].startswith("[") and values[0].endswith("]") and _is_axis(field, values[0]):
        values = list(_pieces(values[0][1:-1]))
    if not all(values):
        raise ConfigError(f"override {field}={text} has an empty value between two commas")
    return values


def with_family(recipe: str, point: Sequence[str]) -> list[str]:
    """Return the overrides of a point, with a whole model section where it names another family than the recipe.

    The section has the fields of the recipe's model that the other family has too.

    Args:
        recipe: name or path.
        point: overrides of the point.
    """
    given = dict(override.split("=", 1) for override in point)
    families = all_families()
    if given.get(FAMILY) not in families:
        return list(point)
    model = load(recipe, [each for each in point if not each.startswith("model.")]).model
    if model.family == given[FAMILY]:
        return list(point)
    shared = {
        name: value
        for name, value in model.model_dump(mode="json", exclude_unset=True).items()
        if name in families[given[FAMILY]].config.model_fields
    }
    section = json.dumps({**shared, "family": given[FAMILY]})
    return [f"model={section}", *(each for each in point if not each.startswith(f"{FAMILY}="))]


def _pieces(text: str) -> Iterator[str]:
    """Yield the parts of a text between commas that are in no brackets and no quotes."""
    closing: list[str] = []
    quote, begin = "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in BRACKETS:
            closing.append(BRACKETS[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter == "," and not closing:
            yield text[begin:place].strip()
            begin = place + 1
    yield text[begin:].strip()


def _is_axis(field: str, text: str) -> bool:
    """Return whether a list is several values of a field and not one value."""
    *sections, last = field.split(".")
    annotations = [
        node.model_fields[last].annotation for node in nodes_at(tuple(sections)) if last in node.model_fields
    ]
    if not annotations:
        return False  # a field of a package, or a wrong one, which `load` names
    kinds = [kind for annotation in annotations for kind in _kinds(annotation)]
    if not any(kind in (list, tuple) for kind in kinds):
        return dict not in kinds
    value = _yaml(text)
    return isinstance(value, list) and bool(value) and all(isinstance(each, list) for each in value)


def _kinds(annotation: Any) -> list[Any]:
    """Return the types that a field may have, without their arguments."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kinds(arguments[0])
    if isinstance(origin, type) and origin in (list, tuple, dict):
        return [origin]
    return [kind for member in arguments for kind in _kinds(member)] if arguments else [annotation]


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.YAMLError:
        return None  # `load` names the fault


def _names(values: Sequence[str]) -> list[str]:
    """Return the name of each value: the families of sections if they differ, else the values themselves."""
    sections = [_yaml(value) if value.startswith("{") else None for value in values]
    families = [
        name for section in sections if isinstance(section, Mapping) and isinstance(name := section.get("family"), str)
    ]
    if len(families) == len(values) == len(set(families)):
        return [_plain(name) for name in families]
    return [_plain(value) for value in values]


def _plain(value: str) -> str:
    """Return a value in the form in which it appears in a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", value).strip("_") or "none"
