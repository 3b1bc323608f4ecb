"""Arguments that several commands share and their parsers.

A shell expands `~` only at the beginning of a word, so `--out=~/x` reaches the command unexpanded.
"""

import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.configs import recipe_names
from byteloom.core.storage.locations import expand_home

BYTELOOM_COMMAND = (sys.executable, "-P", "-m", "pretrain.cli.entry")
"""Command line that runs this Byteloom in another process."""


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
    """Return a path with a leading `~` expanded.

    `~` is expanded in the text, because pathlib reads `./~` as `~`.

    Raises:
        typer.BadParameter: the home folder is not known.
    """
    return Path(parse_location(text))


def check_finite(value: float | None) -> float | None:
    """Return a number if it is finite, or None. This is a typer callback: typer's bounds accept NaN and infinity.

    Raises:
        typer.BadParameter: the number is NaN or infinite.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def complete_recipe(incomplete: str) -> list[str]:
    """Return the recipe names that begin with a text. If there is none, the shell completes paths."""
    return [name for name in recipe_names() if name.startswith(incomplete)]


RunFolderArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False, parser=parse_path)
]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Recipe: a name from `byteloom models`, such as debug, or a .yaml file.",
        show_default=False,
        autocompletion=complete_recipe,
        parser=parse_location,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=VALUE",
        help="Overrides, such as train.steps=50 model.patch_size=4.",
        show_default=False,
    ),
]
NodesOption = Annotated[str | None, typer.Option(help="Number of nodes of a run: 4, or 2-4.")]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes-per-node", help="Number of ranks on each node. Default: one for each GPU."),
]
GpusOption = Annotated[
    str | None, typer.Option("--gpus-per-node", help="GPUs of each node: a number, or a type and a number: h100:8.")
]
PartitionOption = Annotated[str | None, typer.Option(help="Slurm partition.")]
AccountOption = Annotated[str | None, typer.Option(help="Slurm account to charge.")]
TimeOption = Annotated[
    str | None,
    typer.Option("--time", help="Time limit of a job: 90 (minutes), 12:00:00 or 2-00:00:00. A longer run restarts."),
]
