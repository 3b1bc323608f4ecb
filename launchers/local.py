"""Starts on this machine."""

import importlib
from pathlib import Path


def run_in_process(entry: str, recipe: Path) -> int:
    """Runs the train entry in this very process, where a debugger can follow it.

    Args:
        entry: "module:function"; the function takes the path of a resolved recipe and returns an exit code.
    """
    module, _, function = entry.partition(":")
    return int(getattr(importlib.import_module(module), function)(recipe))
