"""The `sweep` command: one run for each point of a grid of recipes and values, on a cluster or on this machine.

    RECIPE  a=1,2  b=x,y  c=3  ──▶  NAME-a-1-b-x, NAME-a-1-b-y, NAME-a-2-b-x, NAME-a-2-b-y

    ROOT/NAME.sweep/
        sweep.json      the sweep's id in MLflow; the grid and the runs of the last start
        …               files of the array's submission; see launchers/submission.py

The same command resumes the unfinished runs. It may add values.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.provenance import trace
from byteloom.core.storage.files import replace_file
from byteloom.core.storage.state_files import read_json
from pretrain.cli.arguments import (
    AccountOption,
    GpusOption,
    NodesOption,
    PartitionOption,
    ProcessesOption,
    TimeOption,
    parse_location,
)
from pretrain.cli.runs.run_set import ClusterOption, ParallelOption, RunSet, slurm_cluster
from pretrain.config.errors import ConfigError
from pretrain.config.loading import find, load
from pretrain.config.schema import Config
from pretrain.experiments.grid import grid, with_family
from pretrain.experiments.results import run_table
from pretrain.experiments.words import Words, read_words
from pretrain.terminal.console import say

app = typer.Typer()


@app.command("sweep")
def sweep_command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE… FIELD=VALUES…",
            help="Recipes and grid: debug train.seed=0,1 train.steps=10,20 is four runs.",
            show_default=False,
            parser=parse_location,
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the sweep's folder and of its run in MLflow. Default: as the first run.")
    ] = None,
    parallel: ParallelOption = None,
    cluster: ClusterOption = None,
    nodes: NodesOption = None,
    processes: ProcessesOption = None,
    gpus: GpusOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    time_limit: TimeOption = None,
) -> None:
    """Train one run for each combination of recipes and values.

    MLflow groups the runs. Repeat the command to resume the unfinished ones.
    """
    options = {"nodes": nodes, "processes_per_node": processes, "gpus_per_node": gpus}
    chosen = slurm_cluster(cluster, options | {"partition": partition, "account": account, "time": time_limit})
    swept = read_words(words)
    runs = _runs(swept, name)
    grid_words = list(swept.entries[0].overrides) if len(swept.entries) == 1 else words
    runs = runs.tracked(_identity(runs, grid_words), {"sweep": " ".join(grid_words)})
    if chosen is None:
        code = runs.train_here(parallel or 1)
        run_table(runs.results()).print()
        raise typer.Exit(code)
    if jobs := runs.submit(chosen, parallel):
        typer.echo("\n".join(jobs))
        return
    say(f"nothing to submit: all {len(runs.configs)} runs are finished or have a job")
    run_table(runs.results()).print()


def _runs(swept: Words, name: str | None) -> RunSet:
    """Return the runs of a sweep.

    Args:
        swept: recipes and overrides.
        name: of the sweep; None for the names of the recipes' runs.

    Raises:
        ConfigError: a recipe or an override is wrong, or there is one combination only.
    """
    configs, sources, names = dict[str, Config](), dict[str, dict[str, str]](), list[str]()
    for entry in swept.entries:
        points, source = grid(entry.overrides), trace(find(entry.recipe))
        if len(swept.entries) == len(points) == 1:
            raise ConfigError(
                "there is one combination only; give several recipes, or give a field several values, such as "
                "optimizer.learning_rate=1e-3,3e-4"
            )
        for point, overrides in points.items():
            values = with_family(entry.recipe, overrides)
            base = load(entry.recipe, values).run.name
            names.append(base)
            run = _joined(base, point)
            run = _joined(base, entry.name, point) if run in configs else run
            configs[run] = load(entry.recipe, [*values, f"run.name={run}"])
            sources[run] = source
    others = len(swept.entries) - 1
    name = name or (f"{names[0]}-and-{others}-more" if others else names[0])
    return RunSet(name, Path(next(iter(configs.values())).run.root) / f"{name}.sweep", configs, sources)


def _joined(*parts: str) -> str:
    return "-".join(filter(None, parts))


@dataclass(frozen=True)
class _StoredSweep:
    id: str


def _identity(runs: RunSet, words: Sequence[str]) -> str:
    """Return the id of a sweep, which stays the same when it resumes."""
    path = runs.folder / "sweep.json"
    stored = read_json(path, _StoredSweep, "remove it, and MLflow shows the sweep as a new one")
    identity = stored.id if stored else uuid.uuid4().hex
    runs.folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"id": identity, "overrides": list(words), "runs": list(runs.configs)}, indent=1))
    return identity
