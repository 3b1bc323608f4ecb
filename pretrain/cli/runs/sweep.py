"""The `sweep` command: one run for each point of a grid of overrides, on a cluster or on this machine.

    RECIPE  a=1,2  b=x,y  c=3  ──▶  NAME-a-1-b-x, NAME-a-1-b-y, NAME-a-2-b-x, NAME-a-2-b-y

    ROOT/NAME.sweep/
        sweep.json      the sweep's id in MLflow; the grid and the runs of the last start
        …               files of the array's submission; see launchers/submission.py

The same command resumes the unfinished runs. It may add values.
"""

import itertools
import json
import re
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.provenance import save_resolved, trace
from byteloom.core.storage.files import replace_file
from byteloom.core.storage.state_files import read_json
from launchers.processes import STOPPED
from launchers.slurm.presets import load_cluster
from launchers.submission import submit_array
from pretrain.cli.arguments import (
    BYTELOOM_COMMAND,
    AccountOption,
    GpusOption,
    NodesOption,
    PartitionOption,
    ProcessesOption,
    RecipeArgument,
    TimeOption,
    parse_location,
)
from pretrain.cli.runs.submit import refuse_if_trained, submission_of
from pretrain.config.errors import ConfigError
from pretrain.config.loading import find, load
from pretrain.config.schema import Config
from pretrain.terminal.console import say
from pretrain.terminal.losses import unit_of
from pretrain.tracking import ParentRun, fault_of, shown
from pretrain.training.run_status import status_of

SWEEP_POLL_SECONDS = 0.2

app = typer.Typer()


@app.command("sweep")
def sweep_command(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="FIELD=VALUES",
            help="Grid: train.seed=0,1 model.patch_size=4,8 is four runs.",
            show_default=False,
        ),
    ],
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Most runs at once. Default: 1 on this machine, all on a cluster."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Slurm preset (gpu, cpu) or .yaml file. Default: train here.", parser=parse_location),
    ] = None,
    nodes: NodesOption = None,
    processes: ProcessesOption = None,
    gpus: GpusOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    time_limit: TimeOption = None,
) -> None:
    """Train one run for each combination of values.

    MLflow groups the runs. Repeat the command to resume the unfinished ones.
    """
    options = {"nodes": nodes, "processes_per_node": processes, "gpus_per_node": gpus}
    options |= {"partition": partition, "account": account, "time": time_limit}
    if cluster is None and (given := [name for name, value in options.items() if value is not None]):
        raise ConfigError(f"--{given[0].replace('_', '-')} needs --cluster")
    chosen = load_cluster(cluster, options) if cluster else None
    if chosen is not None and chosen.scheduler != "slurm":
        raise ConfigError(f"--cluster {cluster} is a preset of this machine; leave out --cluster to train here")
    name, configs = _configs(recipe, overrides)
    source = trace(find(recipe))
    first = next(iter(configs.values()))
    root = Path(first.run.root)
    folder = root / f"{name}.sweep"
    parent = _parent(first, name, _identity(folder, overrides, list(configs)), len(configs), overrides)
    if parent is not None:
        configs = {name: _child(config, parent.id) for name, config in configs.items()}
    if chosen is None:
        raise typer.Exit(_train_here(configs, source, root, folder, parallel or 1, parent))
    submissions = []
    for name, config in configs.items():
        run = (root / name).resolve()
        submissions.append(submission_of(run, config, chosen, source))
        refuse_if_trained(submissions[-1])
    if parent is not None:
        parent.set_status("SCHEDULED")
    try:
        jobs = submit_array(submissions, folder.resolve(), parallel or len(submissions))
    except Exception:
        if parent is not None:
            parent.set_status("FAILED")
        raise
    for name, job in zip(configs, jobs, strict=True):
        say(f"job {job} trains {root / name}")
    typer.echo("\n".join(jobs))


def _configs(recipe: str, overrides: Sequence[str]) -> tuple[str, dict[str, Config]]:
    """Return the name of a sweep, and the configs of its runs by their names.

    Raises:
        ConfigError: the recipe or an override is wrong.
    """
    points = grid(overrides)
    name = load(recipe, next(iter(points.values()))).run.name
    runs = {f"{name}-{point}": values for point, values in points.items()}
    return name, {run: load(recipe, [*values, f"run.name={run}"]) for run, values in runs.items()}


def grid(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the overrides of each point of a grid, by the suffix of the run's name that shows its values.

    Raises:
        ConfigError: an override is malformed, no field has several values, or two points would share a name.
    """
    axes = {field: _values(field, text) for field, _, text in (override.partition("=") for override in overrides)}
    if len(axes) < len(overrides):
        raise ConfigError("a field is given twice; give all its values in one override, such as train.seed=0,1")
    varied = [field for field, values in axes.items() if len(values) > 1]
    if not varied:
        raise ConfigError(
            "there is one combination only; give a field several values, such as optimizer.learning_rate=1e-3,3e-4"
        )
    short = {field: field.rpartition(".")[2] for field in varied}
    clear = {field: last if list(short.values()).count(last) == 1 else field for field, last in short.items()}
    points: dict[str, list[str]] = {}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        name = "-".join(f"{clear[field]}-{_plain(point[field])}" for field in varied)
        if name in points:
            raise ConfigError(
                f"two runs of the sweep would have the same name, which ends in {name}; change one of the values"
            )
        points[name] = [f"{field}={value}" for field, value in point.items()]
    return points


def _values(field: str, text: str) -> list[str]:
    """Return the values of a list such as "1e-3,3e-4" as text; commas within brackets do not separate values."""
    if not field or not text:
        raise ConfigError(f"override {field!r}={text!r} is not of the form section.field=value,value")
    return re.findall(r"(?:[^,\[\]{}]|\[[^\]]*\]|\{[^}]*\})+", text)


def _plain(value: str) -> str:
    """Return a value in the form in which it appears in a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", value).strip("_") or "none"


@dataclass(frozen=True)
class _StoredSweep:
    id: str


def _identity(folder: Path, overrides: Sequence[str], runs: Sequence[str]) -> str:
    """Return the id of a sweep, which stays the same when it resumes."""
    path = folder / "sweep.json"
    stored = read_json(path, _StoredSweep, "remove it, and MLflow shows the sweep as a new one")
    identity = stored.id if stored else uuid.uuid4().hex
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"id": identity, "overrides": list(overrides), "runs": list(runs)}, indent=1))
    return identity


def _parent(config: Config, name: str, identity: str, runs: int, overrides: Sequence[str]) -> ParentRun | None:
    """Return the sweep's own MLflow run, or None if runs are not tracked.

    Raises:
        ConfigError: MLflow refuses the run. Without it, MLflow could not group the runs.
    """
    if not config.tracking.enabled:
        return None
    try:
        return ParentRun(config.tracking, Path(config.run.root), name, identity, runs, {"sweep": " ".join(overrides)})
    except Exception as error:  # MLflow raises many kinds of errors
        uri = shown(config.tracking.store(Path(config.run.root)))
        raise ConfigError(
            f"MLflow at {uri}: {fault_of(error)}. MLflow groups the runs of a sweep; "
            "set tracking.enabled=false to train without it"
        ) from error


def _child(config: Config, parent: str) -> Config:
    tracking = config.tracking.model_copy(update={"parent": parent})
    return config.model_copy(update={"tracking": tracking})


def _train_here(
    configs: dict[str, Config],
    source: Mapping[str, str],
    root: Path,
    folder: Path,
    parallel: int,
    parent: ParentRun | None,
) -> int:
    """Train the runs on this machine, at most `parallel` at once; return the exit code."""
    files = {name: folder / f"{name}.yaml" for name in configs}
    for name, config in configs.items():
        save_resolved(files[name], config.as_yaml(), source)
    codes = _run_all(files, parallel)
    for name in configs:
        if (root / name / "run.json").exists():
            status = status_of(root / name)
            bits = status.validation_loss or status.loss
            loss = f", {bits:.4f} {unit_of(status.metric)}" if bits else ""
            say(f"{name}: {status.state} at step {status.step}{loss}")
    failed = [name for name, code in codes.items() if code not in (0, *STOPPED)]
    stopped = len(codes) < len(configs) or any(code in STOPPED for code in codes.values())
    for name in failed:
        say(f"error: {name} failed; the same command resumes it")
    if parent is not None:
        parent.set_status("FAILED" if failed else "KILLED" if stopped else "FINISHED")
    return 1 if failed else 130 if stopped else 0


def _run_all(recipes: dict[str, Path], parallel: int) -> dict[str, int]:
    """Train runs; return the exit codes of those that started. No run starts after a request to stop."""
    waiting, running, codes = list(recipes), dict[str, subprocess.Popen[bytes]](), dict[str, int]()
    while waiting or running:
        if waiting and len(running) < parallel:
            name = waiting.pop(0)
            say(f"{len(recipes) - len(waiting)} of {len(recipes)}: {name}")
            running[name] = subprocess.Popen([*BYTELOOM_COMMAND, "train", str(recipes[name])])
            continue
        try:
            time.sleep(SWEEP_POLL_SECONDS)
        except KeyboardInterrupt:  # the runs received it too, and save
            waiting = []
        for name, process in list(running.items()):
            if (code := process.poll()) is not None:
                del running[name]
                codes[name] = code
                waiting = [] if code in STOPPED else waiting
    return codes
