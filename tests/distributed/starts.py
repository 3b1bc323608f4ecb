"""Starts of the train entry in real ranks: what a launcher does, by forks (ranks.py)."""

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
from tests.distributed.ranks import CONTEXT, take_place

PATIENCE = 120
"""Looks at a start, a second apart, until it must have ended; the time in which the machine stands still is one."""
WHERE_ARE_YOU = signal.SIGUSR1
"""Has a rank say where each of its threads is."""


class Start:
    """The ranks of one start of a run.

    Args:
        said: a new folder, for what each of them says.
        prepare: called in each rank before it trains, with its number and what will be the process ids of all.
    """

    def __init__(
        self, recipe: Path, ranks: int, said: Path, prepare: Callable[[int, Sequence[int]], None] | None = None
    ) -> None:
        said.mkdir(parents=True)
        self._said = said
        pids, port = CONTEXT.RawArray("i", ranks), free_port()
        self.processes = [
            CONTEXT.Process(target=_train, args=(rank, ranks, port, recipe, said, prepare, pids), daemon=True)
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float) -> None:
        """Until so much time has passed, or one has ended."""
        wait([process.sentinel for process in self.processes if process.exitcode is None], seconds)

    def finish(self, grace: float = 0.0) -> list[int | None]:
        """The exit codes, when all have ended; when one has failed, the others are ended after so many seconds."""
        for _ in range(PATIENCE):
            self.wait(1.0)
            if any(process.exitcode for process in self.processes):
                time.sleep(grace)
                break
            if all(process.exitcode is not None for process in self.processes):
                break
        else:
            raise AssertionError(f"has not ended: {self._where_they_are()}\n{self.said}")
        for process in self.processes:
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def _where_they_are(self) -> str:
        """The ranks that have not ended, each of which says where its threads are."""
        late = {rank: process.pid for rank, process in enumerate(self.processes) if process.exitcode is None}
        for pid in late.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, WHERE_ARE_YOU)
        time.sleep(1)
        return ", ".join(f"rank {rank}" for rank in late)

    @property
    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self._said.iterdir()))


def _train(
    rank: int,
    ranks: int,
    port: int,
    recipe: Path,
    said: Path,
    prepare: Callable[[int, Sequence[int]], None] | None,
    pids: Any,
) -> None:
    """A rank's process."""
    pids[rank] = os.getpid()
    with (said / f"{rank}").open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        faulthandler.register(WHERE_ARE_YOU, os.dup(file.fileno()))
    take_place(rank, ranks, port)
    if prepare is not None:
        prepare(rank, pids)
    sys.exit(train_entry(recipe))


def train(tree: Any, folder: Path, ranks: int = 1) -> str:
    """Trains the recipe of a tree, with files of its own in a folder; returns what was said.

    Raises:
        AssertionError: it did not come to its end.
    """
    codes, said = start(tree, folder, ranks)
    assert not any(codes), said
    return said


def start(tree: Any, folder: Path, ranks: int = 1) -> tuple[list[int | None], str]:
    """As `train`, with the exit codes."""
    number = len(list(folder.glob("recipe-*.yaml")))
    recipe = folder / f"recipe-{number}.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    it = Start(recipe, ranks, folder / f"said-{number}")
    return it.finish(grace=1.0), it.said
