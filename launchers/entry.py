"""Call of the train entry in this process, with or without a launcher that watches it."""

import faulthandler
import importlib
import os
import signal
from contextlib import ExitStack, suppress
from pathlib import Path

from byteloom.core.packages import long_lived_imports
from launchers.supervision.heartbeat import Heartbeat, folder_of, stack_of
from launchers.supervision.output import rotated_output


def run_in_process(entry: str, recipe: Path) -> int:
    """Run the train entry in this process, where a debugger can follow it; return its exit code.

    Args:
        entry: "module:function"; the function takes the path of a resolved recipe and returns an exit code.
        recipe: the resolved recipe.
    """
    name, _, function = entry.partition(":")
    with long_lived_imports():
        module = importlib.import_module(name)
    return int(getattr(module, function)(recipe))


def run_watched(entry: str, recipe: Path) -> int:
    """Run the train entry as a rank with heartbeats, which writes its stacks on SIGQUIT; return its exit code."""
    rank = int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])
    heartbeat = Heartbeat.of(os.environ, rank)
    folder = folder_of(os.environ)
    with ExitStack() as held:
        with suppress(OSError):  # a full disk: the rank trains, and cannot answer SIGQUIT
            stacks = None if folder is None else held.enter_context(stack_of(folder, rank).open("w"))
            if stacks is not None:
                faulthandler.register(signal.SIGQUIT, stacks, all_threads=True)
        with suppress(OSError):  # the same: it prints where its launcher sends it
            held.enter_context(rotated_output(os.environ, rank))
        heartbeat.beat("start")
        code = run_in_process(entry, recipe)
        heartbeat.end(code)
    return code
