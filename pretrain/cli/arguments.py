"""Arguments that several commands share, and the parsers and checks of their values.

A shell expands `~` only at the beginning of a word, so `--out=~/x` reaches the command unexpanded.
"""

import math
import os
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.configs import recipe_names
from byteloom.core.locations import expand_home


def parse_location(text: str | Path) -> str:
    """Return the text of a path or a URL with a leading `~` expanded.

    Raises:
        typer.BadParameter: the home folder is not known.
    """
    try:
        return expand_home(os.fspath(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text}: {error}") from error


def parse_path(text: str | Path) -> Path:
    """Return a path with a leading `~` expanded. pathlib would take `./~` for `~`, so this comes before it.

    Raises:
        typer.BadParameter: the home folder is not known.
    """
    return Path(parse_location(text))


def check_finite(value: float) -> float:
    """Return a number that is finite; for typer's `callback`, whose bounds let NaN and infinity pass.

    Raises:
        typer.BadParameter: it is not.
    """
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def complete_recipe(incomplete: str) -> list[str]:
    """Return the recipe names that begin with a text; a shell completes paths itself where there is none."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="Recipe: a name that `byteloom models` lists, such as debug or megabyte/text, or a .yaml file.",
        show_default=False,
        autocompletion=complete_recipe,
        parser=parse_location,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=VALUE",
        help="Overrides of fields, such as train.steps=50 model.patch_size=4.",
        show_default=False,
    ),
]
