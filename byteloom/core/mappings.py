"""Nested mappings, such as sections of a recipe."""

from collections.abc import Mapping
from typing import Any


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping updated with the entries of another one; mappings within are merged."""
    both = {
        key: laid_over(below[key], value)
        if isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        else value
        for key, value in above.items()
    }
    return {**below, **both}
