"""Read a recipe and its overrides into a checked config.

recipe.yaml + dotted overrides ─▶ load ─▶ Config, immutable and checked
"""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from byteloom.core.configs import UnknownNameError, find_recipe
from byteloom.core.validation import shorten
from pretrain.config.errors import ConfigError, ValueOrigins, describe_faults
from pretrain.config.fields import FieldPath
from pretrain.config.recipe_yaml import RecipeLoader
from pretrain.config.schema import Config
from pretrain.training.run_folder import as_started


def load(recipe: str | Path, overrides: Sequence[str] = (), run: Path | None = None) -> Config:
    """Return the config of a recipe with `section.field=value` overrides applied.

    Args:
        recipe: its name or its path; see `find`.
        overrides: later ones replace earlier ones.
        run: folder of the run whose recipe it is; its relative paths lead from where that run was started. None: the
            folder that holds the file, if it is that of a run.

    Raises:
        ConfigError: the recipe cannot be found or read, or a field or override is wrong.
    """
    path = find(recipe)
    origins = ValueOrigins(str(path))
    try:
        tree = _read_yaml(path, origins)
        if run is not None or (path.parent / "run.json").exists():
            tree = as_started(tree, run or path.parent)
        return _overridden(tree, overrides, origins)
    except RecursionError as error:
        raise ConfigError(f"{path}: a value is nested too deeply, or contains itself") from error


def find(recipe: str | Path) -> Path:
    """Return the file of a recipe, given its path or the name of one that comes with Byteloom.

    Raises:
        ConfigError: no recipe has this name.
    """
    try:
        return find_recipe(str(recipe))
    except UnknownNameError as error:
        raise ConfigError(str(error)) from None


def with_overrides(tree: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    """Return the config of a tree that `Config.as_tree` made, with overrides applied.

    Args:
        tree: plain values; it is not changed.
        overrides: later ones replace earlier ones.
        source: the file or folder that holds the tree, for errors.

    Raises:
        ConfigError: an override is wrong, or another version of Byteloom made the tree.
    """
    return _overridden(copy.deepcopy(tree), overrides, ValueOrigins(source))


def tree_of(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the values of overrides as a tree, which is not checked.

    Raises:
        ConfigError: an override is not of the form section.field=value.
    """
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply(override, tree, ValueOrigins("the command line"))
    return tree


def _overridden(tree: dict[str, Any], overrides: Sequence[str], origins: ValueOrigins) -> Config:
    for override in overrides:
        _apply(override, tree, origins)
    return _validated(tree, origins)


def _validated(tree: dict[str, Any], origins: ValueOrigins) -> Config:
    unusable: dict[FieldPath, str] = {}
    usable = json.dumps(_usable(tree, (), unusable))
    invalid = None
    try:
        # Strict, so that "50" is not a number; through JSON, because strict nested nodes take mappings only from JSON.
        config = Config.model_validate_json(usable, strict=True)
    except ValidationError as error:
        invalid = error
    if faults := describe_faults(invalid, unusable, origins):
        raise ConfigError("\n".join(fault.text for fault in faults), faults)
    return config


def _usable(value: Any, path: FieldPath, unusable: dict[FieldPath, str]) -> Any:
    """Return a value of a tree, with null for each value that no field takes; record why in `unusable`."""
    fault = None
    if isinstance(value, dict):
        return {str(name): _usable(entry, (*path, str(name)), unusable) for name, entry in value.items()}
    if isinstance(value, list):
        return [_usable(entry, (*path, str(number)), unusable) for number, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        fault = f"is {value}; it must be a finite number"
    elif isinstance(value, int) and abs(value) >= 2**63:
        fault = f"is {value:.3g}; it must be less than 2^63"
    elif isinstance(value, str) and not _is_utf8(value):
        fault = f"is {value!r}; it must be UTF-8 text"
    elif not isinstance(value, str | int | float | None):
        fault = f"is of the YAML type {type(value).__name__}; it must be a number, text, a list or a section"
    if fault is None:
        return value
    unusable[path] = fault
    return None


def _is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; a command's argument that is not UTF-8 has lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _apply(override: str, tree: dict[str, Any], origins: ValueOrigins) -> None:
    name, equals, text = override.partition("=")
    shown = f"override {shorten(override)}"
    if not equals or not name:
        raise ConfigError(f"{shown} is not of the form section.field=value")
    if not _is_utf8(override):
        raise ConfigError(f"{shown}: it is not UTF-8 text")
    *sections, last = path = tuple(name.split("."))
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{shown}: {section} is a value, not a section")
    try:
        node[last] = yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{shown}: the value is not YAML: {_first_line(error)}") from error
    origins.override(path, shown)


def _read_yaml(path: Path, origins: ValueOrigins) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a recipe: it is not UTF-8 text") from error
    try:
        loader = RecipeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path} is not a recipe: it has no sections")
        return _mapping(loader, root, (), origins)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {_first_line(error)}") from error


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, path: FieldPath, origins: ValueOrigins) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        here = (*path, key)
        line = f"{origins.source}:{key_node.start_mark.line + 1}"
        if key in result:
            raise ConfigError(f"{line}: {'.'.join(here)} is given twice, first at {origins.lines[here]}")
        origins.lines[here] = line
        if isinstance(value_node, yaml.MappingNode):
            result[key] = _mapping(loader, value_node, here, origins)
        else:
            result[key] = loader.construct_object(value_node, deep=True)
    return result


def _first_line(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).partition("\n")[0]
