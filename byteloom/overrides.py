"""Overrides of a recipe, as keyword arguments."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return keyword arguments as the overrides that commands take.

    Args:
        values: values by section or by dotted field: `train={"steps": 50}` and `{"train.steps": 50}` are the same.

    Raises:
        TypeError: a value is not one that a recipe can hold.
    """
    return [f"{name}={json.dumps(value, default=os.fspath)}" for name, value in _fields(values, "")]


def _fields(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
