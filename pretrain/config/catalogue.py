"""The catalogue: what each recipe builds, its size and cost beside the paper's, without drawing a weight."""

import re
from dataclasses import dataclass
from pathlib import Path

from byteloom.core.configs import recipe_files
from pretrain.config.errors import ConfigError
from pretrain.config.loading import load
from pretrain.engines import compute_dtype, gpu_precision
from pretrain.estimate.footprint import measure_kept, on_meta, shardings

TRAINING_PASSES = 3
"""The backward pass has two products for each of the forward's: for the inputs' gradients and for the weights'."""
COMMENT_PATTERN = "^# {}: (.+?)\\.$"
"""Of a recipe's opening comment."""


@dataclass(frozen=True)
class CatalogueEntry:
    path: Path
    family: str
    task: str | None
    """What the model reads. This and what the paper says are from lines of the recipe's opening comment, such as
    `# Printed size: 758M + 262M (why it is not the true one).` None: there is no such line."""
    printed: str | None
    """The number of parameters that the paper prints."""
    printed_remark: str | None
    """Why that is not the true one."""
    result: str | None
    """The paper's."""
    parameters: int
    flops_per_byte: float
    """Of the forward pass over a full row, by the bytes that it reads."""
    states: int
    """Bytes of weights, gradients, masters and moments in one process, in the recipe's precision on a GPU."""
    activations: int | None
    """Bytes that the forward pass over a micro-batch keeps for the backward pass. None: no micro-batch was named."""

    @property
    def training_flops_per_byte(self) -> float:
        return TRAINING_PASSES * self.flops_per_byte


def read_recipes(folder: Path, micro_batch: int | None = None) -> list[CatalogueEntry]:
    """Every recipe in a folder, in the order of their paths.

    Args:
        micro_batch: rows to measure the activations of.
    Raises:
        ConfigError: one is wrong, or there is none.
    """
    recipes = [_read(path, micro_batch) for path in recipe_files(folder)]
    if not recipes:
        raise ConfigError(f"{folder} has no recipe: no .yaml file")
    return recipes


def _read(path: Path, micro_batch: int | None) -> CatalogueEntry:
    config = load(path)
    dtype = compute_dtype(gpu_precision(config.engine.precision))
    model = on_meta(config.model)
    (alone,) = shardings(model, dtype, gpus=1)
    text = path.read_text(encoding="utf-8")
    size = _said(text, "Printed size") or ""
    printed, _, remark = size.partition(" (")
    return CatalogueEntry(
        path=path,
        family=config.model.family,
        task=_said(text, "Task"),
        printed=printed or None,
        printed_remark=remark.removesuffix(")") or None,
        result=_said(text, "Result"),
        parameters=model.parameter_count(),
        flops_per_byte=model.flops(config.model.sequence_length) / config.model.sequence_length,
        states=alone.bytes,
        activations=None if micro_batch is None else measure_kept(config.model, micro_batch, dtype),
    )


def _said(text: str, name: str) -> str | None:
    found = re.search(COMMENT_PATTERN.format(name), text, re.MULTILINE)
    return found[1] if found else None
