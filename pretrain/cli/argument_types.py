"""Types of command arguments: what typer takes as a `parser` or a `callback`. Imported as `types`.

A shell expands `~` only at the beginning of a word: --out=~/x arrives as it was typed.
"""

import math
import os
from pathlib import Path

import typer

from byteloom.core.locations import expand_home


def location(text: str | Path) -> str:
    """Return the text of a path or a URL with a leading `~` expanded.

    Raises:
        typer.BadParameter: the home folder is not known.
    """
    try:
        return expand_home(os.fspath(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text}: {error}") from error


def path(text: str | Path) -> Path:
    """Return a path with a leading `~` expanded. pathlib would take `./~` for `~`, so this comes before it.

    Raises:
        typer.BadParameter: the home folder is not known.
    """
    return Path(location(text))


def finite(value: float) -> float:
    """Return a number that is finite; for typer's `callback`, whose bounds let NaN and infinity pass.

    Raises:
        typer.BadParameter: it is not.
    """
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value
