"""Recipes in which every line has a comment, generated from the docstrings of the config.

    train:                            # Length of the run and size of a step.
      steps: 200                      # Optimizer steps of the whole run.

`byteloom config show RECIPE --explain` prints one. The recipes debug are such files, and `make recipes` writes them
again.
"""

import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from byteloom.core.configs import CONFIGS
from byteloom.core.registries.names import RegisteredName
from byteloom.core.storage.files import replace_file
from pretrain.config.loading import load
from pretrain.config.recipe_yaml import RecipeLoader, as_flow
from pretrain.config.schema import Config

COMMENT_COLUMN = 36
LINE_LENGTH = 120
NARROWEST_COMMENT = 40
FULL_RECIPE = CONFIGS / "debug.yaml"
"""The recipe that lists every field. Those of other families list the fields that they set, and all of `model`."""


def annotated(config: Config, shown: Mapping[str, Any] | None = None) -> str:
    """Return a config as a recipe in which each line has a comment.

    Args:
        config: the config.
        shown: tree whose sections and fields are written, and the whole section `model`; None writes all.
    """
    sections = []
    for name, field in Config.model_fields.items():
        if shown is None or name in shown:
            part = None if shown is None or name == "model" else {name: shown[name]}
            sections.append("\n".join(_lines(config, {name: field}, part, "")) + "\n")
    return "\n".join(sections)


def summary(text: str) -> str:
    """Return the first sentence of a docstring."""
    joined = " ".join(text.split())
    found = re.match(r"(.+?\.)(?= |$)", joined)
    return found[1] if found else joined


def debug_recipes() -> list[Path]:
    """Return the files that this module writes."""
    return sorted(CONFIGS.rglob("debug.yaml"))


def rewritten(path: Path) -> str:
    """Return a debug recipe with its opening comment and its values, and with comments and new fields of the config."""
    text = path.read_text(encoding="utf-8")
    opening = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    shown = None if path == FULL_RECIPE else yaml.load(text, RecipeLoader)
    return f"{opening}\n{annotated(load(path), shown)}"


def _lines(
    node: BaseModel, fields: Mapping[str, FieldInfo], shown: Mapping[str, Any] | None, indent: str
) -> Iterator[str]:
    values = node.model_dump(mode="json")
    for name, field in fields.items():
        if shown is not None and name not in shown:
            continue
        value = getattr(node, name)
        if isinstance(value, BaseModel):
            yield from _commented(f"{indent}{name}:", summary(field.description or value.__doc__ or ""))
            inner = shown[name] if shown is not None and isinstance(shown[name], Mapping) else None
            yield from _lines(value, _own_first(type(value)), inner, f"{indent}  ")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            yield from _commented(f"{indent}{name}:", _explanation(field))
            for entry in value:
                first, *more = _lines(entry, _own_first(type(entry)), None, f"{indent}    ")
                yield f"{indent}  - {first[len(indent) + 4 :]}"
                yield from more
        else:
            yield from _commented(f"{indent}{name}: {as_flow(values[name])}", _explanation(field))


def _own_first(node: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a config class, those of its base classes last."""
    own = {name: field for name, field in node.model_fields.items() if name in node.__annotations__}
    return own | node.model_fields


def _commented(text: str, comment: str) -> Iterator[str]:
    """Yield a line with its comment: beside it and below, or above a long value."""
    column = max(COMMENT_COLUMN, len(text) + 2)
    if column > LINE_LENGTH - NARROWEST_COMMENT:
        yield f"{' ' * (len(text) - len(text.lstrip()))}# {comment}"
        yield text
        return
    first, *more = textwrap.wrap(comment, LINE_LENGTH - column - 2, break_on_hyphens=False)
    yield f"{text:{column}}# {first}"
    for line in more:
        yield f"{'':{column}}# {line}"


def _explanation(field: FieldInfo) -> str:
    """Return the first sentence about a field, with the names that it may hold."""
    text = summary(field.description or "")
    names = next((entry.names() for entry in field.metadata if isinstance(entry, RegisteredName)), None)
    *others, last = names or _literals(field.annotation) or [""]
    return f"{text.removesuffix('.')}: {', '.join(others)} or {last}." if others else text


def _literals(annotation: Any) -> list[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return [str(name) for name in arguments]
    if origin in (types.UnionType, typing.Union, typing.Annotated):
        return [name for argument in arguments for name in _literals(argument)]
    return []


if __name__ == "__main__":
    for debug_recipe in debug_recipes():
        replace_file(debug_recipe, rewritten(debug_recipe))
