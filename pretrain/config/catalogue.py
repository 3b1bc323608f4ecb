"""Catalogue of recipes: size and cost of each model, and the figures of its paper.

Models are built on the meta device, so no weight is drawn.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from byteloom.core.configs import recipe_files
from pretrain.config.errors import ConfigError
from pretrain.config.loading import load
from pretrain.engines import compute_dtype, gpu_precision
from pretrain.estimate.activations import measure_kept, on_meta
from pretrain.estimate.states import shardings
from pretrain.models.base import TRAINING_PASSES

COMMENT_PATTERN = "^# {}: (.+?)\\.$"
"""Pattern of a line in the opening comment of a recipe."""


@dataclass(frozen=True)
class CatalogueEntry:
    """A recipe, its size and cost, and the figures of its paper.

    Task, printed size, result and evaluation come from lines of the recipe's opening comment, such as
    `# Printed size: 758M + 262M (why it is not the true one).`
    """

    path: Path
    family: str
    task: str | None
    """Kind of data that the model reads. None: the comment has no such line."""
    printed: str | None
    """Number of parameters that the paper prints."""
    printed_remark: str | None
    """Reason why the printed number is not the true one."""
    result: str | None
    """Result that the paper prints."""
    parameters: int
    flops_per_byte: float
    """FLOPs of the forward pass over a full row, divided by its bytes."""
    states: int
    """Bytes of weights, gradients, masters and moments in one process, in the recipe's precision on a GPU."""
    activations: int | None
    """Bytes that the forward pass over a micro-batch keeps for the backward pass. None: not measured."""
    evaluation: str | None = None
    """Mode, stride and split of the printed result, or what of them the paper does not state."""

    @property
    def training_flops_per_byte(self) -> float:
        """FLOPs of the forward and the backward pass, per byte."""
        return TRAINING_PASSES * self.flops_per_byte


def read_recipes(folder: Path, micro_batch: int | None = None) -> list[CatalogueEntry]:
    """Return the entries of all recipes in a folder, sorted by path.

    Args:
        folder: the folder of the recipes.
        micro_batch: rows of which to measure the activations; None to skip that.

    Raises:
        ConfigError: a recipe is wrong, or there is none.
    """
    recipes = [_read(path, micro_batch) for path in recipe_files(folder)]
    if not recipes:
        raise ConfigError(f"{folder} has no recipe: no .yaml file")
    return recipes


def _read(path: Path, micro_batch: int | None) -> CatalogueEntry:
    config = load(path)
    dtype = compute_dtype(gpu_precision(config.engine.precision))
    model = on_meta(config.model)
    (alone,) = shardings(model, config.optimizer.entry, dtype, gpus=1)
    text = path.read_text(encoding="utf-8")
    size = _comment(text, "Printed size") or ""
    printed, _, remark = size.partition(" (")
    return CatalogueEntry(
        path=path,
        family=config.model.family,
        task=_comment(text, "Task"),
        printed=printed or None,
        printed_remark=remark.removesuffix(")") or None,
        result=_comment(text, "Result"),
        evaluation=_comment(text, "Evaluation"),
        parameters=model.parameter_count(),
        flops_per_byte=model.flops(config.model.sequence_length) / config.model.sequence_length,
        states=alone.bytes,
        activations=None if micro_batch is None else measure_kept(config.model, micro_batch, dtype),
    )


def _comment(text: str, name: str) -> str | None:
    found = re.search(COMMENT_PATTERN.format(name), text, re.MULTILINE)
    return found[1] if found else None
