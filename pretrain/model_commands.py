"""The commands that say what models there are, what they cost, and whether they fit."""

import itertools
import json
import string
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from byteloom.core.configs import CONFIGS
from pretrain import argument_types as types
from pretrain import config as configuration
from pretrain.arguments import OverridesArgument, RecipeArgument
from pretrain.console import printable
from pretrain.engines import CheckpointingConfig, compute_dtype, gpu_precision
from pretrain.footprint import KEEP_ALL, USABLE, Line, Sharding, activation_line, on_meta, shardings
from pretrain.models import families
from pretrain.recipes import Recipe, read_recipes

app = typer.Typer(invoke_without_command=True)

JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.", parser=types.path)]


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    recipes: Annotated[
        Path,
        typer.Option(help="Folder of recipes.", show_default="the recipes that come with Byteloom", parser=types.path),
    ] = CONFIGS,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Rows to measure the activations of; takes some seconds.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """List every model family and recipe: size, cost a byte, memory, and the paper's figures beside them."""
    if context.invoked_subcommand is not None:
        return
    found = read_recipes(recipes, micro_batch)
    _print_catalogue(found, recipes, micro_batch)
    if json_path is not None:
        json_path.write_text(json.dumps([_as_json(recipe) for recipe in found], indent=1), encoding="utf-8")


@app.command()
def estimate(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int, typer.Option(min=1, help="How many share the work.")] = 1,
    memory: Annotated[float, typer.Option(min=0, help="Of one GPU, in GiB.", callback=types.finite)] = 80.0,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Rows; the recipe's own when left out.")] = None,
    json_path: JsonOption = None,
) -> None:
    """Say whether a recipe fits into GPUs, sharded in each way, and the largest micro-batch that does.

    Activations are measured without a GPU, with and without activation checkpointing: the recipe's, or of every block.
    """
    config = configuration.load(recipe, overrides or [])
    precision = gpu_precision(config.engine.precision)
    dtype = compute_dtype(precision)
    rows = micro_batch or config.train.micro_batch
    checkpointing = config.engine.activation_checkpointing
    if checkpointing.mode not in ("full", "selective"):
        checkpointing = CheckpointingConfig(mode="full")
    plain, checkpointed = (activation_line(config.model, dtype, way) for way in (KEEP_ALL, checkpointing))
    found = shardings(on_meta(config.model), dtype, gpus)
    usable = memory * 2**30 * USABLE
    title = f"{recipe}, GPUs: {gpus} of {memory:g} GiB, micro-batch {rows}, {precision}"
    _print_estimate(title, found, plain, checkpointed, rows, usable)
    if json_path is not None:
        figures = {
            "recipe": recipe,
            "gpus": gpus,
            "memory_bytes": memory * 2**30,
            "usable_bytes": usable,
            "micro_batch": rows,
            "precision": precision,
            "activation_bytes": {"plain": plain.at(rows), "checkpointing": checkpointed.at(rows)},
            "shardings": {
                sharding.name: sharding.states._asdict()
                | {
                    "largest_micro_batch": {
                        "plain": plain.rows_within(usable - sharding.bytes),
                        "checkpointing": checkpointed.rows_within(usable - sharding.bytes),
                    }
                }
                for sharding in found
            },
        }
        json_path.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _print_catalogue(recipes: list[Recipe], folder: Path, micro_batch: int | None) -> None:
    remarks = list(dict.fromkeys(recipe.printed_remark for recipe in recipes if recipe.printed_remark))
    letters = dict(zip(remarks, string.ascii_lowercase, strict=False))
    out = Console()
    for family, config in families().items():
        table = Table(
            title=f"{family}: {config.__doc__}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        table.add_column("recipe", min_width=29, overflow="fold")
        for name, width in (("params", 7), ("printed", 13), ("forward", 7), ("training", 8), ("states", 6)):
            table.add_column(name, justify="right", min_width=width, no_wrap=True)
        if micro_batch is not None:
            table.add_column("kept", justify="right", min_width=4, no_wrap=True)
        table.add_column("result", overflow="fold")
        of_task = itertools.groupby(
            sorted((r for r in recipes if r.family == family), key=lambda r: r.task or ""), lambda r: r.task
        )
        for task, group in of_task:
            table.add_row(f"[italic]{escape(task or 'of no task')}[/italic]")
            for recipe in group:
                row = [
                    "  " + escape(printable(_name(recipe, folder))),
                    f"{recipe.parameters / 1e6:,.1f}",
                    escape(f"{recipe.printed or ''} {letters.get(recipe.printed_remark or '', ' ')}"),
                    _short(recipe.flops_per_byte / 1e6),
                    _short(recipe.training_flops_per_byte / 1e6),
                    _short(recipe.states / 2**30),
                    *([] if recipe.activations is None else [_short(recipe.activations / 2**30)]),
                ]
                table.add_row(*row, escape(recipe.result or ""))
        out.print(table)
    legend = [
        "recipe: the name that commands take, as in `byteloom train debug`."
        if folder == CONFIGS
        else f"recipe: the file {folder}/RECIPE.yaml.",
        "params: millions. printed: as the paper prints them;",
        *(f"  {letters[remark]}  {remark}" for remark in remarks),
        "forward, training: millions of operations for each byte read, over a full row.",
        "result: the paper's, in bits a byte unless it says words or seconds.",
        "states: GiB of weights, gradients, masters and moments in one process.",
    ]
    if micro_batch is not None:
        legend.append(f"kept: GiB of activations that the backward pass over {micro_batch} full rows needs.")
    for line in legend:
        out.print(printable(line), markup=False, highlight=False)


def _name(recipe: Recipe, folder: Path) -> str:
    """Return a recipe's path in its folder, without .yaml."""
    return recipe.path.relative_to(folder).with_suffix("").as_posix()


def _print_estimate(
    title: str, found: list[Sharding], plain: Line, checkpointed: Line, rows: int, usable: float
) -> None:
    table = Table(title=escape(printable(title)), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("sharding", no_wrap=True)
    for name in ("weights", "gradients", "optimizer", "activations", "in all", "", "most rows"):
        table.add_column(name, justify="right", no_wrap=True)
    for kept, line in (("all activations kept", plain), ("activation checkpointing", checkpointed)):
        table.add_section()
        table.add_row(f"[italic]{kept}[/italic]")
        for sharding in found:
            states, total = sharding.states, sharding.bytes + line.at(rows)
            most = line.rows_within(usable - sharding.bytes)
            table.add_row(
                "  " + sharding.name,
                _gib(states.weights),
                _gib(states.gradients),
                _gib(states.masters + states.moments),
                _gib(line.at(rows)),
                _gib(total),
                "[green]fits[/green]" if total <= usable else "[red]too much[/red]",
                f"{most:,}" if most else "none",
            )
    out = Console()
    out.print(table)
    out.print(
        f"GiB on each GPU; most rows: the largest micro-batch that fits. Fits: {_gib(usable)} GiB at most, "
        f"{USABLE:.0%} of the memory; the rest is for what is not counted: the CUDA context, workspaces, "
        "buffers of communication, fragmentation.",
        highlight=False,
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f}"


def _short(number: float) -> str:
    """With three digits or more."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe) | {
        "path": str(recipe.path),
        "training_flops_per_byte": recipe.training_flops_per_byte,
    }
