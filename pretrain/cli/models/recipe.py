"""The `recipe` command: a recipe from a budget."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pretrain.cli.arguments import check_finite, parse_location, parse_path
from pretrain.config.new_recipe import run_name, schema_beside
from pretrain.config.schema import Config
from pretrain.experiments.budget_recipe import choices, recipe_of, short, write_budget_recipe
from pretrain.experiments.sizing import DeviceBudget, size_run
from pretrain.terminal.console import say
from pretrain.terminal.tables import JsonOption, Table, print_json, print_lines

app = typer.Typer()


@app.command()
def recipe(
    flops: Annotated[
        float,
        typer.Option(help="Training FLOPs, such as 1e18.", show_default=False, min=1, callback=check_finite),
    ],
    family: Annotated[str, typer.Option(help="Model family.")] = "spacebyte",
    memory: Annotated[float, typer.Option(min=0, help="Memory of one GPU, in GiB.", callback=check_finite)] = 80.0,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(min=64, help="Context in bytes. Default: by the FLOPs.", show_default=False)
    ] = None,
    shards: Annotated[
        str, typer.Option(help="Corpus to train on: a folder or a URL.", parser=parse_location)
    ] = "runs/corpora/train",
    out: Annotated[
        Path | None, typer.Option(help="Recipe to write, such as my.yaml.", show_default=False, parser=parse_path)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose sizes, batch, bytes and learning rate for a budget of FLOPs and memory.

    Shows each choice with its reason. The guide "Transfer a learning rate" has the sources of the rules.
    """
    if out is not None:
        schema_beside(out, force)  # refuse at once what cannot be written
    devices = DeviceBudget(memory * 2**30, gpus)
    run = size_run(family, flops, devices, sequence_length)
    name = (run_name(out) if out else "") or f"{family}-{short(flops)}"
    tree = recipe_of(run, name, shards, devices)
    Config.model_validate(tree)
    if out is not None:
        exact = short(flops) if float(short(flops)) == flops else str(flops)
        words = ["--family", family, "--flops", exact, "--memory", f"{memory:g}", "--gpus", str(gpus)]
        words += ["--sequence-length", str(sequence_length)] if sequence_length else []
        command = shlex.join(["byteloom", "recipe", *words, "--shards", shards])
        schema = write_budget_recipe(tree, out, command, force)
    if as_json:
        print_json(tree)
        return
    table = Table(f"{family} for {short(flops)} FLOPs", ["choice", "value", "reason"])
    for choice in choices(run, flops, devices):
        table.add_row(*choice)
    table.print()
    if out is None:
        print_lines(["", "Nothing is written; --out FILE writes the recipe."])
    else:
        say(f"{out} is the recipe; {schema} describes its fields for editors")
