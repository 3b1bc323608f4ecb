"""What recipes build: the family, size and cost of each, without drawing a weight."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.config import ConfigError, load
from pretrain.models import build_model

PRINTED_SIZE = re.compile(r"^# Printed size: (.+?)(?: \(.*)?\.$", re.MULTILINE)
"""The line of a recipe's opening comment that says what the paper calls its size; what is in brackets is a remark."""


@dataclass(frozen=True)
class RecipeSize:
    path: Path
    family: str
    parameters: int
    printed: str | None
    """As the paper prints it; None where the recipe's comment has no such line."""
    flops_per_byte: float
    """Of the forward pass over a full row, by the bytes that it reads."""


def recipe_sizes(folder: Path) -> list[RecipeSize]:
    """Of every recipe in a folder, in the order of their paths.

    Raises:
        ConfigError: one is wrong, or there is none.
    """
    sizes = [_size_of(path) for path in sorted(folder.rglob("*.yaml"))]
    if not sizes:
        raise ConfigError(f"{folder} holds no recipe")
    return sizes


def _size_of(path: Path) -> RecipeSize:
    config = load(path).model
    with torch.device("meta"):
        model = build_model(config)
    return RecipeSize(
        path=path,
        family=config.family,
        parameters=model.parameter_count(),
        printed=next(iter(PRINTED_SIZE.findall(path.read_text(encoding="utf-8"))), None),
        flops_per_byte=model.flops(config.sequence_length) / config.sequence_length,
    )
