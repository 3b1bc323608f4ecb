"""The `config` commands: show, copy, check and explain recipes."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.arguments import OverridesArgument, RecipeArgument, complete_recipe, parse_location, parse_path
from pretrain.config.annotation import annotated
from pretrain.config.checks.findings import print_findings
from pretrain.config.checks.recipe import check_recipe
from pretrain.config.explanation import explain
from pretrain.config.loading import load
from pretrain.config.new_recipe import write_copy
from pretrain.config.schema import recipe_schema
from pretrain.terminal.console import say
from pretrain.terminal.tables import JsonOption, print_json, print_lines

app = typer.Typer(help="Show, copy, check and explain recipes.", no_args_is_help=True)


@app.command("show")
def config_show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    explained: Annotated[bool, typer.Option("--explain", help="Explain each field in a comment.")] = False,
) -> None:
    """Print a recipe with its overrides and all defaults."""
    config = load(recipe, overrides or [])
    typer.echo(annotated(config) if explained else config.as_yaml(), nl=False)


@app.command("new")
def config_new(
    path: Annotated[
        Path, typer.Argument(help="File to write, such as my.yaml.", show_default=False, parser=parse_path)
    ],
    recipe: Annotated[
        str,
        typer.Option(
            "--from",
            help="Recipe to copy: a name or a .yaml file.",
            autocompletion=complete_recipe,
            parser=parse_location,
        ),
    ] = "debug",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Copy a recipe to a file that you can edit.

    The copy keeps the comments.
    A JSON schema is written next to it, for editors.
    """
    schema = write_copy(recipe, path, force)
    say(f"{path} is a copy of the recipe {recipe}; {schema} describes its fields for editors")


@app.command("check")
def config_check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Check a run without training it.

    Checks the recipe, data, checkpoint, memory, disk and packages, and writes nothing.
    The exit code is 1 if `byteloom train` would fail.
    """
    findings = check_recipe(recipe, overrides or [])
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        print_findings(findings)
    raise typer.Exit(any(finding.level == "error" for finding in findings))


@app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    typer.echo(json.dumps(recipe_schema(), indent=1))


@app.command("explain")
def config_explain(
    field: Annotated[
        str, typer.Argument(metavar="FIELD", help="Field, such as model.patch_size, or section, such as model.")
    ],
) -> None:
    """Explain a field or a section: meaning, type, default and bounds."""
    print_lines(explain(field).splitlines())
