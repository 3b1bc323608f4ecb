"""The `train` command, and the train entry that launchers start in each rank."""

import os
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import typer

from byteloom.core.provenance import read_source, save_resolved, trace
from launchers.local import run_processes
from pretrain.cli.arguments import TRAINING_PANEL, OverridesArgument, RecipeArgument
from pretrain.cli.faults import FAULTS
from pretrain.config.loading import find, load
from pretrain.config.schema import Config
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


@app.command("train", rich_help_panel=TRAINING_PANEL)
def train_command(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Train a run, or resume it from its newest checkpoint."""
    config = load(recipe, overrides or [])
    place, processes = place_of(os.environ), config.launch.processes
    if place is not None and processes not in (1, place.size):
        raise WorldError(
            f"launch.processes is {processes}, but another launcher has started {place.size} ranks already; "
            "set launch.processes=1"
        )
    is_first = place is None or place.rank == 0
    source = trace(find(recipe)) if is_first else {}
    if place is not None or processes == 1:
        raise typer.Exit(_train(config, source))
    with tempfile.TemporaryDirectory(prefix="byteloom-") as folder:
        resolved = Path(folder) / "recipe.yaml"
        save_resolved(resolved, config.as_yaml(), source)
        log_of = RunFolder(Path(config.run.root) / config.run.name).log_of
        raise typer.Exit(run_processes(TRAIN_ENTRY, resolved, processes, log_of))


def start(recipe: Path) -> int:
    """Train as one rank of a launcher; return the exit code."""
    return run(lambda: _train(load(recipe), read_source(recipe)), FAULTS)


def _train(config: Config, source: Mapping[str, str]) -> int:
    place = place_of(os.environ)
    set_rank(place.rank if place else 0)
    crash.keep_in(Path(config.run.root) / config.run.name)
    stop = StopRequest(display.close, "stopped before the first step; there was nothing to save")
    with stop.listening():
        meeting = timedelta(seconds=config.launch.meeting_seconds)
        with display.phase("waiting for the other ranks"):
            world = World.join(choose_device(config.engine.device).type, meeting=meeting)
        try:
            with world.in_contact():
                return train(config, world, source, stop)
        finally:
            world.leave()
