"""The `submit` command: train a run as a supervised job of a cluster."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.provenance import source_text, trace
from byteloom.core.text import count
from launchers.slurm.presets import ClusterConfig, ClusterError, load_cluster
from launchers.submission import Submission
from launchers.supervision.plan import LaunchPlan
from launchers.supervision.record import last_submission
from pretrain.checkpoint import locate
from pretrain.cli.arguments import (
    AccountOption,
    GpusOption,
    NodesOption,
    OverridesArgument,
    PartitionOption,
    ProcessesOption,
    TimeOption,
    complete_recipe,
    parse_location,
)
from pretrain.cli.train import TRAIN_ENTRY
from pretrain.config.loading import find, load
from pretrain.config.schema import Config
from pretrain.terminal.console import say
from pretrain.training.run_folder import RunFolder

app = typer.Typer()


@app.command("submit")
def submit_command(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RUN",
            help="Recipe (name or .yaml file), or folder of a run to submit again.",
            show_default=False,
            autocompletion=complete_recipe,
            parser=parse_location,
        ),
    ],
    overrides: OverridesArgument = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="Preset (gpu, cpu, local) or .yaml file. Default: as last time.",
            parser=parse_location,
        ),
    ] = None,
    nodes: NodesOption = None,
    spares: Annotated[
        int | None, typer.Option(min=0, help="More nodes, which replace faulty ones without a wait in the queue.")
    ] = None,
    processes: ProcessesOption = None,
    gpus: GpusOption = None,
    cpus: Annotated[int | None, typer.Option("--cpus-per-process", help="Number of processors of each rank.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each node, such as 64G.")] = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    qos: Annotated[str | None, typer.Option(help="Slurm quality of service.")] = None,
    time: TimeOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script and the recipe; submit nothing.")
    ] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Submit a run that a process trains now; the job ends that training.")
    ] = False,
) -> None:
    """Submit a run to a cluster, or resume it there.

    A supervisor restarts the run after failures, requeues its job, or ends it.
    """
    earlier = last_submission(Path(recipe))
    of_run = _recipe_of_run(Path(recipe), earlier)
    file = find(of_run or recipe)
    options = {
        "nodes": nodes,
        "spares": spares,
        "processes_per_node": processes,
        "gpus_per_node": gpus,
        "cpus_per_process": cpus,
        "memory": memory,
        "partition": partition,
        "account": account,
        "qos": qos,
        "time": time,
    }
    if cluster is None and earlier is None:
        raise ClusterError("--cluster is missing: name a preset (gpu, cpu, local) or a .yaml file")
    chosen = load_cluster(cluster or f"{earlier}/cluster.yaml", options)
    config = load(file, overrides or [], None if of_run is None else Path(recipe))
    for warning in config.warnings():
        say(f"warning: {warning.text}")
    run = (Path(config.run.root) / config.run.name).resolve()
    if of_run is not None:
        _refuse_other_folder(Path(recipe), run, config, overrides or [])
    submission = submission_of(run, config, chosen, trace(file))
    if dry_run:
        typer.echo(submission.script())
        typer.echo(f"# The job looks after: {submission.srun()}\n")
        typer.echo(config.as_yaml(), nl=False)
        return
    if not take_over:
        refuse_if_trained(submission)
    job = submission.submit()
    for doubt in submission.doubts:
        say(f"warning: job {job} may wait without an end: {doubt}")
    on_nodes = f"{chosen.nodes} node{'' if chosen.nodes == '1' else 's'}"
    on_nodes += f" (and {count(chosen.spares, 'spare')})" if chosen.spares else ""
    say(
        f"job {job} trains {run} on {on_nodes} with {count(chosen.ranks_per_node, 'rank')} each; "
        f"{submission.folder} has its script and logs"
    )
    typer.echo(job)


def refuse_if_trained(submission: Submission) -> None:
    """Raise ClusterError if a job of the run lives, or a process trains it, from which a job would take the run."""
    submission.refuse_second()
    if holder := RunFolder(submission.run).holder():
        raise ClusterError(
            f"{holder} trains {submission.run} now, and a job would take the run from it; stop it first, or submit "
            "with --take-over"
        )


def _recipe_of_run(folder: Path, submission: Path | None) -> Path | None:
    """Return the resolved recipe of a run's last start, or None if the folder is not a run."""
    recipe = (submission or folder) / "config.yaml"
    return recipe if recipe.is_file() else None


def _refuse_other_folder(folder: Path, run: Path, config: Config, overrides: Sequence[str]) -> None:
    """Raise ClusterError if the recipe of a run would train in another folder, and no override says so.

    Args:
        folder: of the run, as the command names it.
        run: folder in which the recipe would train.
        config: the recipe with its overrides.
        overrides: of the command.
    """
    is_chosen = any(override.startswith(("run.name=", "run.root=")) for override in overrides)
    if not is_chosen and run != folder.resolve():
        raise ClusterError(
            f"the recipe of {folder} trains {run} from here: run.root is {config.run.root} and run.name is "
            f"{config.run.name}; the run was moved, or renamed: set run.root and run.name, or submit it in the folder "
            "from which its relative paths start"
        )


def submission_of(run: Path, config: Config, cluster: ClusterConfig, source: Mapping[str, str]) -> Submission:
    """Return the job of a run.

    Args:
        run: its folder.
        config: its config.
        cluster: resources of the job.
        source: provenance of the recipe, from `trace`.
    """
    recipe = config.as_yaml()
    return Submission(run, recipe, plan_of(run, config, cluster), cluster, source_text(recipe, source))


def plan_of(run: Path, config: Config, cluster: ClusterConfig) -> LaunchPlan:
    """Return the plan that the supervisor of a run follows."""
    home = locate(RunFolder(run).checkpoints_in(config.checkpoint.home))
    return LaunchPlan(
        entry=TRAIN_ENTRY,
        run=str(run),
        checkpoints=str(home.resolve() if isinstance(home, Path) else home),
        processes_per_node=cluster.ranks_per_node,
        cpus_per_process=cluster.cpus_per_process,
        gpus_per_node=cluster.gpus_per_node,
        supervise=config.supervise,
        srun=cluster.srun,
        prefix=cluster.prefix,
    )
