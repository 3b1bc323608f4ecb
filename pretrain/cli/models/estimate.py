"""The `models` commands: recipes, the catalogue of Transformers, and an estimate of memory."""

import itertools
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from byteloom.core.configs import CONFIGS
from byteloom.core.text import count
from data_pipeline.stream.dealing import deal
from pretrain.catalogue import Grouping
from pretrain.cli.arguments import OverridesArgument, RecipeArgument, check_finite, parse_path
from pretrain.cli.models.catalogue import about, print_catalogue, print_lineage
from pretrain.config.catalogue import CatalogueEntry, read_recipes
from pretrain.config.loading import load
from pretrain.distributed.context import group_of
from pretrain.engines import CheckpointingConfig, check_context, compute_dtype, gpu_precision
from pretrain.estimate.activations import KEEP_ALL, ActivationLines, activation_lines, on_meta
from pretrain.estimate.patches import SIZES, PatchCost, patch_costs
from pretrain.estimate.states import USABLE, ShardedStates, shardings
from pretrain.estimate.training_flops import training_flops
from pretrain.models import ModelConfig, all_families
from pretrain.models.patching.entropy import EntropyConfig
from pretrain.terminal.tables import JsonOption, Table, figure, print_json, print_lines

app = typer.Typer(invoke_without_command=True)
app.command()(about)


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    recipes: Annotated[
        Path,
        typer.Option(help="Folder of recipes.", show_default="Byteloom's own", parser=parse_path),
    ] = CONFIGS,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Also measure the activations of this many rows (slow).")
    ] = None,
    by: Annotated[
        Grouping | None, typer.Option(help="List the catalogue of Transformers in groups, instead of the recipes.")
    ] = None,
    show_lineage: Annotated[
        bool, typer.Option("--lineage", help="Show which model of the catalogue extends which.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List model families and recipes, with size, cost and memory.

    Also shows the figures that the papers print.
    """
    if context.invoked_subcommand is not None:
        return
    if by is not None or show_lineage:
        if by is not None:
            print_catalogue(by, as_json=as_json)
        else:
            print_lineage(as_json=as_json)
        return
    found = read_recipes(recipes, micro_batch)
    if as_json:
        print_json([_as_json(recipe) for recipe in found])
        return
    for table in catalogue(found, recipes):
        table.print()
        typer.echo()
    print_lines(legend(found, recipes, micro_batch))


@app.command()
def estimate(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    memory: Annotated[float, typer.Option(min=0, help="Memory of one GPU, in GiB.", callback=check_finite)] = 80.0,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Rows of a micro-batch. Default: as in the recipe.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="GPUs that share each row. Default: as in the recipe.")
    ] = None,
    bytes_per_patch: Annotated[
        list[float] | None,
        typer.Option(
            min=1,
            help="Mean size of patches for which to count FLOPs, if patches follow the data (repeatable). "
            f"Default: {', '.join(f'{size:g}' for size in SIZES)}.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate whether a recipe fits into the memory of GPUs.

    Shows each sharding and the largest micro-batch that fits.
    Measures activations without a GPU: once with all of them kept,
    and once with activation checkpointing, as in the recipe or of every block.
    For patches that follow the data, also shows FLOPs by the mean size of a patch.
    """
    config = load(recipe, [*(overrides or []), *([f"engine.context={context}"] if context else [])])
    context = config.engine.context
    check_context(config.engine, gpus)
    precision = gpu_precision(config.engine.precision)
    dtype = compute_dtype(precision)
    rows = micro_batch or config.train.micro_batch
    checkpointing = config.engine.activation_checkpointing
    if checkpointing.mode not in ("full", "selective"):
        checkpointing = CheckpointingConfig(mode="full")
    plain, checkpointed = (
        activation_lines(config.model, dtype, way, context, config.finetune) for way in (KEEP_ALL, checkpointing)
    )
    passes = len(deal(config.train.global_batch, rows, *group_of(0, gpus, context)))
    model = on_meta(config.model, config.finetune)
    costs = patch_costs(model, bytes_per_patch or SIZES) if model.patchers() else []
    _check_sizes(bytes_per_patch or [], costs, model.sequence_length)
    found = shardings(model, config.optimizer.entry, dtype, gpus, passes)
    usable = memory * 2**30 * USABLE
    gpus_in_words = count(gpus, f"GPU of {memory:g} GiB", f"GPUs of {memory:g} GiB each")
    shared = f", each row on {context} of them" if context > 1 else ""
    title = f"{recipe} on {gpus_in_words}{shared}, micro-batch {rows}, {precision}"
    length = config.model.sequence_length
    flops = training_flops(model, config.model, config.finetune) * rows // context
    if as_json:
        figures = {
            "recipe": recipe,
            "gpus": gpus,
            "memory_bytes": memory * 2**30,
            "usable_bytes": usable,
            "micro_batch": rows,
            "passes": passes,
            "context": context,
            "training_flops": flops,
            "forward_flops_per_byte": model.flops(length) / length,
            "by_bytes_per_patch": [
                {
                    "bytes_per_patch": cost.bytes_per_patch,
                    "patches": cost.patches,
                    "useful_forward_flops_per_byte": cost.flops / length,
                }
                for cost in costs
            ],
            "precision": precision,
            "shardings": {
                sharding.name: sharding.states._asdict()
                | {
                    "activation_bytes": {name: line.at(rows) for name, line in lines.items()},
                    "largest_micro_batch": {
                        name: line.rows_within(usable - sharding.bytes) for name, line in lines.items()
                    },
                }
                for sharding in found
                for lines in [
                    {
                        "plain": plain.of(gathers=sharding.gathers),
                        "checkpointing": checkpointed.of(gathers=sharding.gathers),
                    }
                ]
            },
        }
        print_json(figures)
        return
    print_lines([verdict(found, plain, checkpointed, rows, usable)])
    estimate_table(title, found, plain, checkpointed, rows, usable).print()
    print_lines(
        [
            "",
            "All sizes are GiB on each GPU. rows: the largest micro-batch that fits.",
            f"fits: at most {_gib(usable)} GiB, {USABLE:.0%} of the memory. "
            "The rest is for the CUDA context, workspaces, communication buffers and fragmentation.",
            *_remark_on_passes(passes),
            "activations: with the blocks that zero-3, fsdp and hsdp gather for a time.",
            f"A micro-batch takes {figure(flops / 1e12)} TFLOP on each GPU, without activation checkpointing.",
            *_remark_on_entropies(config.model),
        ]
    )
    if costs:
        typer.echo()
        patch_table(costs, model.flops(length), length).print()
        print_lines(
            [
                "",
                "useful: without the empty places of a row, which are computed too. "
                "MFU and comparisons at equal FLOPs count all of them.",
            ]
        )


def _remark_on_entropies(config: ModelConfig) -> list[str]:
    """Return what the FLOPs say of a small model whose entropies make the patches."""
    patcher = getattr(config, "patcher", None)
    if not isinstance(patcher, EntropyConfig):
        return []
    if patcher.entropies == "corpus":
        return ["FLOPs are without those of the small model: its entropies are read beside the corpus."]
    return ["FLOPs have those of the small model, which reads each row. model.patcher.entropies=corpus saves them."]


def catalogue(recipes: Sequence[CatalogueEntry], folder: Path) -> Iterator[Table]:
    """Yield a table of recipes, grouped by task, for each family that has some."""
    letters = _letters(recipes)
    is_measured = any(recipe.activations is not None for recipe in recipes)
    numbers = ["params", "printed", "forward", "training", "states", *(["kept"] if is_measured else [])]
    for name, family in all_families().items():
        of_family = sorted((r for r in recipes if r.family == name), key=lambda r: r.task or "")
        if not of_family:
            continue
        table = Table(f"{name}: {family.config.__doc__}", ["recipe", *numbers, "result"], numbers)
        for task, group in itertools.groupby(of_family, lambda r: r.task):
            table.add_heading(task or "no task")
            for recipe in group:
                table.add_row(
                    "  " + _name(recipe, folder),
                    f"{recipe.parameters / 1e6:,.1f}",
                    f"{recipe.printed or ''} {letters.get(recipe.printed_remark or '', ' ')}".rstrip(),
                    figure(recipe.flops_per_byte / 1e6),
                    figure(recipe.training_flops_per_byte / 1e6),
                    figure(recipe.states / 2**30),
                    *([] if recipe.activations is None else [figure(recipe.activations / 2**30)]),
                    (recipe.result or "") + (f" [{letters[recipe.evaluation]}]" if recipe.evaluation else ""),
                )
        yield table


def legend(recipes: Sequence[CatalogueEntry], folder: Path, micro_batch: int | None) -> list[str]:
    """Return the lines that explain the catalogue's columns."""
    lines = [
        "recipe: the name that commands take, as in `byteloom train debug`."
        if folder == CONFIGS
        else f"recipe: the file {folder}/RECIPE.yaml.",
        "params: millions of parameters. printed: as the paper prints them.",
        "forward, training: millions of operations for each byte read, over a full row "
        "with all the patches that it may have.",
        "states: GiB of weights, gradients, masters and moments in one process.",
        "result: as the paper prints it; bits per byte unless it says words or seconds.",
        "Letters say why a printed size is not the true one, and in brackets how a result was measured:",
        *(f"  {letter:2} {remark}" for remark, letter in _letters(recipes).items()),
    ]
    if micro_batch is not None:
        lines.append(f"kept: GiB of activations for the backward pass over {count(micro_batch, 'full row')}.")
    return lines


def _letters(recipes: Sequence[CatalogueEntry]) -> dict[str, str]:
    """Return letters for each remark on a printed size, and for each evaluation: a to z, then aa to zz."""
    remarks = dict.fromkeys(recipe.printed_remark for recipe in recipes if recipe.printed_remark)
    remarks |= dict.fromkeys(recipe.evaluation for recipe in recipes if recipe.evaluation)
    names = (*string.ascii_lowercase, *map("".join, itertools.product(string.ascii_lowercase, repeat=2)))
    return dict(zip(remarks, names, strict=False))


def _name(recipe: CatalogueEntry, folder: Path) -> str:
    """Return the path of a recipe in its folder, without .yaml."""
    return recipe.path.relative_to(folder).with_suffix("").as_posix()


def estimate_table(
    title: str,
    found: Sequence[ShardedStates],
    plain: ActivationLines,
    checkpointed: ActivationLines,
    rows: int,
    usable: float,
) -> Table:
    """Return a table of the memory of each sharding, with and without activation checkpointing."""
    numbers = ["rows", "in all", "weights", "gradients", "optimizer", "activations"]
    table = Table(title, ["sharding", "verdict", *numbers], numbers)
    for kept, lines in (("all activations kept", plain), ("activation checkpointing", checkpointed)):
        table.add_heading(kept)
        for sharding in found:
            line = lines.of(gathers=sharding.gathers)
            states, total = sharding.states, sharding.bytes + line.at(rows)
            most = line.rows_within(usable - sharding.bytes)
            table.add_row(
                "  " + sharding.name,
                "fits" if total <= usable else "too large",
                f"{most:,}" if most else "none",
                _gib(total),
                _gib(states.weights),
                _gib(states.gradients),
                _gib(states.masters + states.moments),
                _gib(line.at(rows)),
            )
    return table


def patch_table(costs: Sequence[PatchCost], padded: int, length: int) -> Table:
    """Return a table of FLOPs by the mean size of patches.

    Args:
        costs: of rows, smallest patches first; the first has as many patches as the capacity.
        padded: FLOPs of the forward pass over any row.
        length: bytes of a row.
    """
    stages = range(len(costs[0].patches))
    counts = [f"patches of stage {stage}" for stage in stages] if len(stages) > 1 else ["patches of a row"]
    numbers = ["bytes per patch", *counts, "useful MFLOP", "share"]
    title = f"FLOPs of a byte, forward pass: {figure(padded / length / 1e6)} MFLOP with any patches"
    table = Table(title, numbers, numbers)
    for cost in costs:
        table.add_row(
            f"{cost.bytes_per_patch:.3g}",
            *(f"{count:,.0f}" for count in cost.patches),
            figure(cost.flops / length / 1e6),
            f"{cost.flops / padded:.0%}",
        )
    return table


def _check_sizes(sizes: Sequence[float], costs: Sequence[PatchCost], length: int) -> None:
    """Refuse mean sizes of patches that a full row of `length` bytes cannot have."""
    if sizes and not costs:
        raise typer.BadParameter("the patches of this model do not follow the data", param_hint="--bytes-per-patch")
    least = costs[0].bytes_per_patch if costs else 1
    for size in sizes:
        if not least <= size <= length:
            raise typer.BadParameter(
                f"{size:g}: a full row of this model has patches of {least:.3g} to {length:,} bytes",
                param_hint="--bytes-per-patch",
            )


def verdict(
    found: Sequence[ShardedStates], plain: ActivationLines, checkpointed: ActivationLines, rows: int, usable: float
) -> str:
    """Return a sentence that tells whether a micro-batch fits."""
    fitting = {
        how: [s.name for s in found if s.bytes + lines.of(gathers=s.gathers).at(rows) <= usable]
        for how, lines in (("with all activations kept", plain), ("with activation checkpointing", checkpointed))
    }
    ways = [
        f"{'every sharding' if 1 < len(names) == len(found) else ', '.join(names)} {how}"
        for how, names in fitting.items()
        if names
    ]
    if not ways:
        return f"It does not fit: no sharding stays within {_gib(usable)} GiB on each GPU."
    return f"It fits: {'; '.join(ways)}."


def _remark_on_passes(passes: int) -> list[str]:
    """Return why fsdp and hsdp hold whole gradients, if they do."""
    return [f"gradients: fsdp and hsdp hold them whole until the last of {passes} passes."] if passes > 1 else []


def _gib(count: float) -> str:
    return figure(count / 2**30)


def _as_json(recipe: CatalogueEntry) -> dict[str, Any]:
    return asdict(recipe) | {
        "path": str(recipe.path),
        "training_flops_per_byte": recipe.training_flops_per_byte,
    }
