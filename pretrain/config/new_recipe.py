"""Copy a recipe to edit, with the JSON schema by which an editor checks and completes it.

The copy begins with these lines, followed by the comments of the original:

    # yaml-language-server: $schema=byteloom.schema.json
    # Made from the recipe debug by `byteloom config new`.
    # Edit it, then: byteloom train my.yaml
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from byteloom.core.configs import is_shipped, name_of
from byteloom.core.storage.files import replace_file
from byteloom.core.text import printable
from pretrain.config.errors import ConfigError
from pretrain.config.loading import find, load
from pretrain.config.recipe_yaml import as_scalar
from pretrain.config.schema import SCHEMA_TITLE, recipe_schema

SCHEMA_FILE = "byteloom.schema.json"
MODELINE, MADE, THEN = "# yaml-language-server: ", "# Made from the recipe ", "# Edit it, then: "
ONLY_OF_THE_ORIGINAL = (MODELINE, MADE, THEN, "# Weights: ", "# Printed size: ", "# Result: ")
"""Beginnings of comments that are false for an edited copy."""


def write_copy(recipe: str, path: Path, force: bool = False) -> Path:
    """Write a copy of a recipe, and name its run after the file; return the path of the schema.

    Args:
        recipe: the name or the path of the original.
        path: the file to write.
        force: replace a file that exists.

    Raises:
        ConfigError: the original is wrong, or a file exists.
    """
    original = find(recipe)
    run = load(original).run.name
    schema = schema_beside(path, force)
    text = _renamed(original.read_text(encoding="utf-8-sig"), run_name(path) or run)
    name = name_of(original) if is_shipped(original) else printable(recipe)
    _write(path, schema, _with_header(text, name, path))
    return schema


def write_recipe(text: str, path: Path, made_by: str, force: bool = False) -> Path:
    """Write the text of a recipe with the schema for editors; return the path of the schema.

    Args:
        text: of the recipe.
        path: the file to write.
        made_by: command that made it.
        force: replace a file that exists.

    Raises:
        ConfigError: a file exists.
    """
    schema = schema_beside(path, force)
    header = f"{MODELINE}$schema={SCHEMA_FILE}\n# Made by `{made_by}`.\n{THEN}{_command(path)}\n"
    _write(path, schema, header + text)
    return schema


def schema_beside(path: Path, force: bool) -> Path:
    """Return the path of the schema beside a recipe that may be written.

    Raises:
        ConfigError: the path is a folder, or a file exists.
    """
    schema = path.with_name(SCHEMA_FILE)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it, such as {path / 'my.yaml'}")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists already; choose another name, or replace it with --force")
    if schema.exists() and not _is_ours(schema):
        raise ConfigError(f"{schema} was not written by Byteloom; move it, or choose another folder for {path.name}")
    return schema


def _write(path: Path, schema: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(schema, json.dumps(recipe_schema(), indent=1) + "\n")
    replace_file(path, text)


def _is_ours(schema: Path) -> bool:
    try:
        return bool(json.loads(schema.read_text(encoding="utf-8"))["title"] == SCHEMA_TITLE)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_name(path: Path) -> str:
    """Return a run name from the name of a file: letters, digits, points, underscores and hyphens."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-")


def _renamed(text: str, name: str) -> str:
    """Return a recipe with another run.name; comments keep their columns."""
    scalar = _entry(_entry(yaml.compose(text, yaml.SafeLoader), "run"), "name")
    begin, end = scalar.start_mark.index, scalar.end_mark.index
    before, new, after = text[:begin], as_scalar(name), text[end:]
    if gap := re.match(r" +(?=#)", after):
        after = " " * max(1, len(gap[0]) + (end - begin) - len(new)) + after[gap.end() :]
    return before + new + after


def _entry(mapping: Any, key: str) -> Any:
    """Return the node of a key that exists, because the recipe was loaded."""
    return next(value for name, value in mapping.value if name.value == key)


def _with_header(text: str, original: str, path: Path) -> str:
    """Return a recipe with the origin in its opening comment, and without lines that are false for a copy."""
    lines = text.splitlines(keepends=True)
    size = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    kept = "".join(line for line in lines[:size] if not line.startswith(ONLY_OF_THE_ORIGINAL))
    command = _command(path)
    header = re.sub(rf"byteloom train {re.escape(original)}(?=[\s`]|$)", lambda _: command, kept)
    made = f"{MADE}{original} by `byteloom config new`.\n{THEN}{command}\n"
    return f"{MODELINE}$schema={SCHEMA_FILE}\n{made}{header}{''.join(lines[size:])}"


def _command(path: Path) -> str:
    return f"byteloom train {printable(shlex.quote(str(path)))}"
