"""Recipe of a run whose sizes follow from a budget, and the reasons of its values."""

from pathlib import Path
from typing import Any, NamedTuple

from byteloom.core.text import count
from pretrain.config.annotation import annotated
from pretrain.config.new_recipe import write_recipe
from pretrain.config.schema import Config
from pretrain.experiments.sizing import (
    BASE_WIDTH,
    BATCH_EXPONENT,
    BATCH_FACTOR,
    BYTES_PER_PARAMETER,
    FEWEST_STEPS,
    WIDTH_STEP,
    DeviceBudget,
    SizedRun,
    context_of,
    devices_in_words,
)
from pretrain.models import carries_memory
from pretrain.terminal.progress import size as size_in_words
from pretrain.terminal.tables import figure

WARMUP_SHARE, LONGEST_WARMUP = 0.05, 2000
"""Share of the steps in which the rate rises, and their largest number."""
CHECKPOINTS = 20
"""Checkpoints of a run."""
MOST_PROCESSES = 8
"""GPUs of one machine, on which `byteloom train` starts all ranks."""


class Choice(NamedTuple):
    """A value of a recipe, and its reason."""

    name: str
    value: str
    reason: str


def recipe_of(run: SizedRun, name: str, shards: str, devices: DeviceBudget) -> dict[str, Any]:
    """Return the tree of the recipe of a run.

    Args:
        run: its sizes.
        name: of the run.
        shards: corpus to train on.
        devices: the GPUs.
    """
    every = max(1, round(run.steps / CHECKPOINTS))
    warmup = min(LONGEST_WARMUP, round(WARMUP_SHARE * run.steps), run.steps - 1)
    data: dict[str, Any] = {"shards": shards}
    if carries_memory(run.model):
        data["lanes"] = run.global_batch
    tree: dict[str, Any] = {
        "run": {"name": name},
        "data": data,
        "model": run.model.model_dump(mode="json"),
        "train": {"steps": run.steps, "global_batch": run.global_batch, "micro_batch": run.micro_batch},
        "optimizer": {
            "learning_rate": float(f"{run.learning_rate:.2g}"),
            "scaling": "mup",
            "base": run.base,
            "schedule": {"shape": "polynomial", "warmup_steps": warmup},
        },
        "engine": {"name": run.engine, "activation_checkpointing": {"mode": run.checkpointing}},
        "checkpoint": {"every": every},
    }
    if 1 < devices.gpus <= MOST_PROCESSES:
        tree["launch"] = {"processes": devices.gpus}
    return tree


def write_budget_recipe(tree: dict[str, Any], path: Path, made_by: str, force: bool = False) -> Path:
    """Write a recipe whose lines have comments; return the path of the schema for editors.

    Raises:
        ConfigError: a file exists.
    """
    return write_recipe(f"\n{annotated(Config.model_validate(tree), tree)}", path, made_by, force)


def choices(run: SizedRun, budget: float, devices: DeviceBudget) -> list[Choice]:
    """Return what was chosen, and why, in the order of the decisions."""
    size, ratio = run.size, run.bytes / run.parameters
    context = "longer for larger budgets" if size.sequence_length == context_of(budget) else "as asked"
    if size.width < run.wanted.width:
        why = f"the FLOPs ask for {run.wanted.width:,} channels, which do not fit"
    else:
        why = f"{ratio:.0f} bytes a parameter; best is about {BYTES_PER_PARAMETER}"
        if size.width == WIDTH_STEP and ratio < BYTES_PER_PARAMETER:
            why = f"the narrowest; {why}"
    batch = run.global_batch * size.sequence_length
    is_small = run.bytes / FEWEST_STEPS < BATCH_FACTOR * run.bytes**BATCH_EXPONENT
    kept = "all activations kept" if run.checkpointing == "none" else "activations recomputed"
    return [
        Choice("context", f"{size.sequence_length:,} bytes", context),
        Choice("width", f"{size.width:,} channels", why),
        Choice("depth", f"{size.layers} blocks", "as GPT-3's models of this width"),
        Choice("parameters", f"{run.parameters:,}", ""),
        Choice("bytes", size_in_words(run.bytes), f"what {short(budget)} FLOPs pay for, {_flops(run)} a byte"),
        Choice(
            "batch",
            f"{count(run.global_batch, 'row')}, {size_in_words(batch)}",
            f"a small run has about {FEWEST_STEPS:,} steps" if is_small else "grows as bytes^0.383",
        ),
        Choice("steps", f"{run.steps:,}", "bytes / batch"),
        Choice("rate", f"{run.learning_rate:.2g}", f"of the base, {BASE_WIDTH} channels; root of batch x bytes^-0.32"),
        Choice("schedule", "linear to 0", f"after a warm-up of {WARMUP_SHARE:.0%}, at most {LONGEST_WARMUP:,} steps"),
        Choice(
            "micro-batch",
            count(run.micro_batch, "row"),
            f"{size_in_words(run.device_bytes)} on {devices_in_words(devices)}: {run.engine}, {kept}",
        ),
        Choice("training", f"{short(run.flops)} FLOPs", f"{round(run.flops / budget - 1, 3) + 0.0:+.1%} of the budget"),
    ]


def short(flops: float) -> str:
    """Return a number of FLOPs as it is written on the command line: 1e18."""
    return f"{flops:.3g}".replace("e+", "e")


def _flops(run: SizedRun) -> str:
    return f"{figure(run.row_flops / run.size.sequence_length / 1e6)} MFLOP"
