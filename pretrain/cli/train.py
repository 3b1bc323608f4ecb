"""The `train` command, and the train entry that launchers start in each rank."""

import os
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import typer

from byteloom.core.faults import exit_code_of
from byteloom.core.provenance import read_source, save_resolved, trace
from launchers.local import run_processes
from pretrain.cli.arguments import OverridesArgument, RecipeArgument
from pretrain.config.loading import find, load
from pretrain.config.schema import Config
from pretrain.distributed.nccl import set_up_nccl
from pretrain.distributed.world import World, WorldError, place_of
from pretrain.engines import choose_device
from pretrain.terminal import crash
from pretrain.terminal.console import display, run, set_rank
from pretrain.training.loop import train
from pretrain.training.run_folder import RunFolder
from pretrain.training.stop import StopRequest

TRAIN_ENTRY = "pretrain.cli.train:start"
"""Name by which launchers start `start` in each rank."""

app = typer.Typer()


@app.command("train")
def train_command(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Train a run, or resume it from its newest checkpoint."""
    raise typer.Exit(train_config(load(recipe, overrides or []), find(recipe)))


def train_config(config: Config, recipe: Path) -> int:
    """Train the run of a config in this process, or in as many as it says; return the exit code.

    Args:
        config: the recipe with its overrides.
        recipe: file of the recipe.

    Raises:
        WorldError: another launcher has started other ranks than the config says.
    """
    place, processes = place_of(os.environ), config.launch.processes
    if place is not None and processes not in (1, place.size):
        raise WorldError(
            f"launch.processes is {processes}, but another launcher has started {place.size} ranks already; "
            "set launch.processes=1"
        )
    is_first = place is None or place.rank == 0
    source = trace(recipe) if is_first else {}
    if place is not None or processes == 1:
        return _train(config, source)
    with tempfile.TemporaryDirectory(prefix="byteloom-") as folder:
        resolved = Path(folder) / "recipe.yaml"
        save_resolved(resolved, config.as_yaml(), source)
        log_of = RunFolder(Path(config.run.root) / config.run.name).log_of
        return run_processes(TRAIN_ENTRY, resolved, processes, log_of, config.supervise)


def start(recipe: Path) -> int:
    """Train as one rank of a launcher; return the exit code, which tells a supervisor whether storage failed."""
    return run(lambda: _train(load(recipe), read_source(recipe)), exit_code_of)


def _train(config: Config, source: Mapping[str, str]) -> int:
    place = place_of(os.environ)
    set_rank(place.rank if place else 0)
    folder = Path(config.run.root) / config.run.name
    crash.keep_in(folder)
    stop = StopRequest(display.close, "stopped before the first step; there was nothing to save")
    with stop.listening():
        meeting = timedelta(seconds=config.launch.meeting_seconds)
        with display.phase("waiting for the other ranks"):
            device = choose_device(config.engine.device, place.local_rank if place else 0)
            if device.type == "cuda":
                set_up_nccl(folder, deterministic=config.engine.deterministic)
            world = World.join(device, meeting=meeting)
        try:
            with world.in_contact():
                return train(config, world, source, stop)
        finally:
            world.leave()
