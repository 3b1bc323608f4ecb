"""Starts of the train entry in real ranks, which are forks (ranks.py) instead of a launcher's processes."""

import contextlib
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import yaml

from launchers.processes import free_port
from pretrain.cli.train import start as train_entry
from tests.distributed.ranks import CONTEXT, become_rank

PATIENCE = 120
"""Number of waits of one second until a start must have ended. A pause of the machine counts as one wait."""
PRINT_STACKS = signal.SIGUSR1
"""Signal that makes a rank print the stack of each thread."""


class Start:
    """Ranks of one start of a run.

    Args:
        output: a new folder for the output of each rank.
        prepare: called in each rank before it trains, with its number and the process ids of all ranks.
    """

    def __init__(
        self, recipe: Path, ranks: int, output: Path, prepare: Callable[[int, Sequence[int]], None] | None = None
    ) -> None:
        output.mkdir(parents=True)
        self._output = output
        pids, port = CONTEXT.RawArray("i", ranks), free_port()
        self.processes = [
            CONTEXT.Process(target=_train, args=(rank, ranks, port, recipe, output, prepare, pids), daemon=True)
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float) -> None:
        """Wait until some time has passed or a rank has ended."""
        wait([process.sentinel for process in self.processes if process.exitcode is None], seconds)

    def finish(self, grace: float = 0.0) -> list[int | None]:
        """Wait until all ranks have ended and return their exit codes; kill the others some seconds after a failure."""
        for _ in range(PATIENCE):
            self.wait(1.0)
            if any(process.exitcode for process in self.processes):
                self._wait_for_all(grace)
                break
            if all(process.exitcode is not None for process in self.processes):
                break
        else:
            raise AssertionError(f"has not ended: {self._print_stacks()}\n{self.output}")
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def _wait_for_all(self, seconds: float) -> None:
        """Wait until all ranks have ended, but no longer than some seconds."""
        deadline = time.monotonic() + seconds
        while any(process.exitcode is None for process in self.processes) and time.monotonic() < deadline:
            self.wait(deadline - time.monotonic())

    def _print_stacks(self) -> str:
        """Return the ranks that have not ended, after each has printed the stacks of its threads."""
        running = {rank: process.pid for rank, process in enumerate(self.processes) if process.exitcode is None}
        for pid in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, PRINT_STACKS)
        time.sleep(1)
        return ", ".join(f"rank {rank}" for rank in running)

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in sorted(self._output.iterdir()))


def _train(
    rank: int,
    ranks: int,
    port: int,
    recipe: Path,
    output: Path,
    prepare: Callable[[int, Sequence[int]], None] | None,
    pids: Any,
) -> None:
    """Run a rank in its process."""
    pids[rank] = os.getpid()
    with (output / f"{rank}").open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        faulthandler.register(PRINT_STACKS, os.dup(file.fileno()))
    become_rank(rank, ranks, port)
    if prepare is not None:
        prepare(rank, pids)
    sys.exit(train_entry(recipe))


def train(tree: Any, folder: Path, ranks: int = 1) -> str:
    """Train the recipe of a tree, with new files in a folder, and return the output.

    Raises:
        AssertionError: a rank failed.
    """
    codes, output = start(tree, folder, ranks)
    assert not any(codes), output
    return output


def start(tree: Any, folder: Path, ranks: int = 1) -> tuple[list[int | None], str]:
    """Train like `train`, and return the exit codes and the output."""
    number = len(list(folder.glob("recipe-*.yaml")))
    recipe = folder / f"recipe-{number}.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    ranks_of_start = Start(recipe, ranks, folder / f"output-{number}")
    return ranks_of_start.finish(grace=1.0), ranks_of_start.output
