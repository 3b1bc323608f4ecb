"""The `branch` command: make a run that continues a checkpoint of another run."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from byteloom.core.provenance import read_source
from pretrain.checkpoint import Metadata, locate
from pretrain.cli.arguments import OverridesArgument, parse_location
from pretrain.config.errors import ConfigError
from pretrain.config.loading import with_overrides
from pretrain.config.schema import Config
from pretrain.terminal.console import display, say
from pretrain.training.branching import find_branch_point, make_branch
from pretrain.training.run_folder import STARTED_IN, RunFolder, as_started
from pretrain.training.starting.schedule_changes import describe_rise
from pretrain.training.stop import stopping_at_once

DECAY_LENGTHS = ("decay_steps", "decay_fraction")
"""Two fields of the schedule. A recipe sets one of them. An override of one replaces the other."""

app = typer.Typer()


@app.command("branch")
@stopping_at_once(display.close)
def branch_command(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Run to continue: its folder, or the URL of its checkpoints.",
            show_default=False,
            parser=parse_location,
        ),
    ],
    step: Annotated[int, typer.Option(min=1, help="Step of the checkpoint to continue.", show_default=False)],
    name: Annotated[str, typer.Option(help="Name of the new run.", show_default=False)],
    overrides: OverridesArgument = None,
) -> None:
    """Make a new run that continues a checkpoint of another run.

    It continues the weights, the moments, the place in the data and the counters. Overrides may change the schedule,
    and what a resumed run may change. The other run is only read. `train` or `submit` then starts the new run.
    """
    parent = find_branch_point(run, step)
    config = branched_config(parent, run, name, overrides or [])
    for warning in config.warnings():
        say(f"warning: {warning.text}")
    if rise := describe_rise(parent.state["config"], config, step):
        say(f"warning: {rise}")
    place = locate(run)
    source = read_source(RunFolder(place).config) if isinstance(place, Path) else {}
    with display.phase(f"copying {parent.folder}") as phase:
        folder = make_branch(parent, config, source, phase.update)
    say(
        f"{folder.path} continues {run} after step {step} of {config.train.steps}; train it with "
        f"`byteloom train {folder.config}`, or submit it with `byteloom submit {folder.path}`"
    )


def branched_config(parent: Metadata, run: str, name: str, overrides: Sequence[str]) -> Config:
    """Return the config of a branch: that of the parent's checkpoint, with another name and overrides.

    Args:
        parent: checkpoint that the branch continues.
        run: run folder of the parent, or home of its checkpoints.
        name: of the branch.
        overrides: of the branch.

    Raises:
        ConfigError: an override is wrong, or another version of Byteloom made the checkpoint.
    """
    tree: dict[str, Any] = copy.deepcopy(parent.state["config"])
    tree["run"]["name"] = name
    place = locate(run)
    if isinstance(place, Path) and (place / "run.json").exists():
        tree = as_started(tree, place, parent.state.get(STARTED_IN))
        tree["run"]["root"] = os.fspath(place.parent)
    tree["tracking"]["parent"] = None  # a sweep counts its own runs only
    schedule = tree["optimizer"].get("schedule", {})
    given = {override.partition("=")[0] for override in overrides}
    for length, other in (DECAY_LENGTHS, DECAY_LENGTHS[::-1]):
        if f"optimizer.schedule.{length}" in given:
            schedule[other] = None
    config = with_overrides(tree, overrides, str(parent.folder))
    if config.run.name != name:
        raise ConfigError(f"override run.name={config.run.name}: --name gives the name of a branch")
    return config
