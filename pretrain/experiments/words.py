"""Recipes and overrides among the words of a command.

debug                       a recipe
wide=debug                  a recipe under a name of its own
train.global_batch=8        an override for all recipes
wide:model.dropout=0.2      an override for one recipe, by its name
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from byteloom.core.configs import is_shipped, name_of
from byteloom.core.validation import nearest
from pretrain.config.errors import ConfigError
from pretrain.config.loading import find
from pretrain.config.schema import Config

ENTRY_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
"""Pattern of the name of a recipe. It has no point, by which fields are known."""


@dataclass(frozen=True)
class Entry:
    """A recipe of a set of runs."""

    name: str
    """Name in the names of runs and in tables; unique in the set."""
    recipe: str
    """The recipe as a person gave it: a name or a .yaml file."""
    overrides: tuple[str, ...] = ()
    """Overrides for all recipes, then those for this one."""


@dataclass(frozen=True)
class Words:
    """Recipes and overrides of a command."""

    entries: list[Entry]
    overrides: list[str]
    """Overrides for all recipes."""


def read_words(words: Sequence[str]) -> Words:
    """Return the recipes and the overrides that words name.

    Raises:
        ConfigError: there is no recipe, two recipes have one name, an override is for an unknown recipe, or a recipe
            cannot be found.
    """
    recipes: dict[str, str] = {}
    common: list[str] = []
    own: list[tuple[str, str]] = []
    for word in words:
        if match := re.match(rf"({ENTRY_NAME}):(\w[\w.-]*=.*)", word, re.DOTALL):
            own.append((match[1], match[2]))
        elif _is_override(word):
            common.append(word)
        else:
            name, recipe = _named(word)
            if name in recipes:
                raise ConfigError(f"two recipes have the name {name}; name one of them: OTHER={recipe}")
            recipes[name] = recipe
    if not recipes:
        raise ConfigError("there is no recipe; give one or more, such as debug transformer/debug")
    for name, override in own:
        if name not in recipes:
            hint = nearest(name, list(recipes)) or f"; the recipes are {', '.join(recipes)}"
            raise ConfigError(f"{name}:{override} is for a recipe {name}, which is not given{hint}")
    entries = [
        Entry(name, recipe, (*common, *(override for its_name, override in own if its_name == name)))
        for name, recipe in recipes.items()
    ]
    return Words(entries, common)


def _is_override(word: str) -> bool:
    """Return whether a word is an override and not a recipe, which may have a name of its own."""
    field, equals, _ = word.partition("=")
    if not equals or Path(word).is_file():
        return False
    return field in Config.model_fields or not re.fullmatch(ENTRY_NAME, field)


def _named(word: str) -> tuple[str, str]:
    """Return the name and the recipe of a word such as debug or wide=debug."""
    name, equals, recipe = word.partition("=")
    if equals and re.fullmatch(ENTRY_NAME, name) and not Path(word).is_file():
        find(recipe)
        return name, recipe
    path = find(word)
    text = name_of(path) if is_shipped(path) else path.stem
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "recipe", word
