"""The `compare` command: recipes × seeds with one budget each, and a table of their results.

    RECIPE RECIPE  --seeds 0,1  --flops 1e15  ──▶  NAME-RECIPE-seed-0, NAME-RECIPE-seed-1, …  ──▶  table, page

    ROOT/NAME.compare/
        compare.json    the budget, and each recipe with its steps; see pretrain/experiments/plan.py
        results.csv, results.json, report.html
        trials/         short runs that measure the time of a step, for --seconds
        …               files of the array's submission; see launchers/submission.py

The same command resumes the comparison. It may add recipes and seeds.
"""

import json
import math
import re
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from byteloom.core.provenance import trace
from byteloom.core.storage.files import replace_file
from byteloom.core.storage.locks import LockHeldError, lock_file
from byteloom.core.text import count
from launchers.slurm.presets import ClusterConfig
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
from pretrain.experiments.budget import Budget, StepCost, cost_of
from pretrain.experiments.plan import (
    Plan,
    PlannedRecipe,
    check_same,
    lasting_fields,
    plan_file,
    read_plan,
    save_plan,
)
from pretrain.experiments.results import (
    HEADINGS,
    RecipeResult,
    as_csv,
    as_json,
    read_result,
    result_rows,
    result_table,
    sort_results,
)
from pretrain.experiments.words import Entry, read_words
from pretrain.report.page import Comparison, page_of
from pretrain.report.run_data import read_run
from pretrain.terminal.console import display, say
from pretrain.terminal.tables import JsonOption, print_json, print_lines
from pretrain.tracking.journal import read_journal
from pretrain.training.run_folder import NAME, RunFolder

TRIAL_STEPS, MEASURED_STEPS = 20, 10
"""Steps of a trial, and those at its end whose time is measured."""
TRIAL = (
    "optimizer.schedule={shape: constant, warmup_steps: 0}",
    "tracking={enabled: false}",
    *(f"{section}={{}}" for section in ("validation", "profile", "report", "samples", "callbacks")),
    "checkpoint={every: 1000000}",
    f"train.steps={TRIAL_STEPS}",
)
"""Overrides of a trial: only steps take time, and no tracker gets their numbers."""
OF_THE_BUDGET = {"train.steps": "the budget sets it", "train.seed": "--seeds sets it", "run.name": "--name sets it"}
"""Fields that overrides may not set."""
SHARED = {"data": (), "validation": ("shards", "corpora", "begin"), "objective": ()}
"""Sections by which results of recipes can be compared, and the fields that matter there; none for all."""

app = typer.Typer()


@dataclass(frozen=True)
class _Asked:
    """Arguments of a command, after they were checked."""

    name: str
    folder: Path
    entries: dict[str, Entry]
    configs: dict[str, Config]
    """Config of each recipe, with the recipe's own steps."""
    seeds: tuple[int, ...]
    parallel: int | None
    cluster: ClusterConfig | None


@app.command("compare")
def compare_command(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE… FIELD=VALUE…",
            help="RECIPE or NAME=RECIPE. FIELD=VALUE is for all recipes, NAME:FIELD=VALUE for one.",
            show_default=False,
            parser=parse_location,
        ),
    ],
    flops: Annotated[float | None, typer.Option(help="FLOPs of training of each run, such as 1e15.")] = None,
    read_bytes: Annotated[float | None, typer.Option("--bytes", help="Bytes that each run reads, such as 1e9.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Time of training of each run; a short trial measures it."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Values of train.seed: one run each.")] = "0",
    name: Annotated[str, typer.Option(help="Name of the comparison and beginning of its runs' names.")] = "comparison",
    parallel: ParallelOption = None,
    cluster: ClusterOption = None,
    nodes: NodesOption = None,
    processes: ProcessesOption = None,
    gpus: GpusOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    time_limit: TimeOption = None,
    show: Annotated[bool, typer.Option("--show", help="Train nothing; print the results so far.")] = False,
    as_csv_rows: Annotated[bool, typer.Option("--csv", help="Print CSV, a row for each run.")] = False,
    as_json_tree: JsonOption = False,
) -> None:
    """Train recipes with an equal budget, each with several seeds, and compare their losses.

    One of --flops, --bytes and --seconds is the budget. Repeat the command to resume it.
    The results are in results.csv, results.json and report.html of its folder.
    """
    options = {"nodes": nodes, "processes_per_node": processes, "gpus_per_node": gpus}
    chosen = slurm_cluster(cluster, options | {"partition": partition, "account": account, "time": time_limit})
    budget = _budget({"flops": flops, "bytes": read_bytes, "seconds": seconds})
    asked = _asked(words, name, _seeds(seeds), parallel, chosen)
    code = 0
    with _alone(asked.folder, show=show):
        plan = read_plan(asked.folder, budget)
        for recipe, config in asked.configs.items():
            if recipe in plan.recipes:
                check_same(asked.folder, recipe, plan.recipes[recipe], config)
        is_planned = show or _plan_recipes(asked, plan)
        runs = _runs(asked, plan) if is_planned else None
        if runs is not None and not show:
            code = _train(asked, plan, runs)
    results = [] if runs is None else _results(asked, plan, runs)
    if runs is not None:
        _write(asked, plan, runs, results)
    if as_json_tree:
        print_json(as_json(str(budget), results))
    elif as_csv_rows:
        typer.echo(as_csv(results), nl=False)
    elif results:
        result_table(results).print()
        print_lines(_remarks(asked, plan, results))
    if code:
        raise typer.Exit(code)


def _budget(given: Mapping[str, float | None]) -> Budget:
    """Return the one budget that is given.

    Raises:
        ConfigError: there is none, there are several, or it is not above 0.
    """
    found = {kind: amount for kind, amount in given.items() if amount is not None}
    if len(found) != 1:
        raise ConfigError(f"give one budget: --flops, --bytes or --seconds; {count(len(found), 'budget')} given")
    ((kind, amount),) = found.items()
    if not 0 < amount < math.inf:
        raise ConfigError(f"--{kind} is {amount:g}; it must be a finite number above 0")
    return Budget.model_validate({"kind": kind, "amount": amount})


def _seeds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(f"--seeds is {text}; it must be whole numbers with commas between them, such as 0,1,2")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def _asked(
    words: Sequence[str], name: str, seeds: tuple[int, ...], parallel: int | None, cluster: ClusterConfig | None
) -> _Asked:
    """Return what the words ask for.

    Raises:
        ConfigError: a recipe or an override is wrong, or recipes have different places of runs.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"--name is {name}; it must have only letters, digits, . _ and -")
    entries = {entry.name: entry for entry in read_words(words).entries}
    for entry in entries.values():
        for override in entry.overrides:
            if reason := OF_THE_BUDGET.get(override.partition("=")[0]):
                raise ConfigError(f"override {override}: leave it out, because {reason}")
    configs = {key: _load(entry) for key, entry in entries.items()}
    roots = {config.run.root: key for key, config in configs.items()}
    if len(roots) > 1:
        raise ConfigError(f"recipes have different values of run.root: {', '.join(roots)}; give one: run.root=runs")
    return _Asked(name, Path(next(iter(roots))) / f"{name}.compare", entries, configs, seeds, parallel, cluster)


def _load(entry: Entry, *overrides: str) -> Config:
    """Return the config of a recipe.

    Raises:
        ConfigError: it is wrong; the message names the recipe.
    """
    try:
        return load(entry.recipe, [*entry.overrides, *overrides])
    except ConfigError as error:
        raise ConfigError("\n".join(f"recipe {entry.name}: {line}" for line in str(error).splitlines())) from error


@contextmanager
def _alone(folder: Path, *, show: bool) -> Iterator[None]:
    """Hold the comparison for this command alone, unless it only shows results.

    Raises:
        ConfigError: there is nothing to show, or another command works on it.
    """
    if show:
        if not plan_file(folder).exists():
            raise ConfigError(f"{folder} has no comparison; leave out --show to begin it")
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_file(folder / ".lock", seconds=0.5):
            yield
    except LockHeldError as error:
        raise ConfigError(f"{error.holder} works on {folder}; wait for it, or give --show") from error


def _plan_recipes(asked: _Asked, plan: Plan) -> bool:
    """Plan the recipes that the plan lacks, and store it; return False while jobs of trials have not ended.

    Raises:
        ConfigError: a recipe cannot fit the budget.
    """
    missing = [recipe for recipe in asked.configs if recipe not in plan.recipes]
    costs = {recipe: cost_of(asked.configs[recipe]) for recipe in missing}
    if plan.budget.kind == "seconds" and missing:
        measured = _trials(asked, missing)
        if measured is None:
            save_plan(asked.folder, plan)
            return False
        costs = {recipe: replace(cost, seconds=measured[recipe]) for recipe, cost in costs.items()}
    planned = {recipe: _planned(asked, plan.budget, recipe, cost) for recipe, cost in costs.items()}
    plan.recipes.update(planned)
    save_plan(asked.folder, plan)
    shutil.rmtree(asked.folder / "trials", ignore_errors=True)
    return True


def _planned(asked: _Asked, budget: Budget, recipe: str, cost: StepCost) -> PlannedRecipe:
    steps, config = budget.steps(recipe, cost), asked.configs[recipe]
    _load(asked.entries[recipe], f"train.steps={steps}")  # a schedule may need more steps
    return PlannedRecipe(
        recipe=asked.entries[recipe].recipe,
        config=lasting_fields(config),
        parameters=cost.parameters,
        steps=steps,
        step_flops=cost.flops,
        step_bytes=cost.bytes,
        step_seconds=cost.seconds if budget.kind == "seconds" else None,
    )


def _trials(asked: _Asked, recipes: Sequence[str]) -> dict[str, float] | None:
    """Return the seconds of a step of recipes, which short runs measure; None if their jobs have not ended."""
    folder = asked.folder / "trials"
    configs = {
        recipe: _load(asked.entries[recipe], *TRIAL, f"run.root={folder}", f"run.name={recipe}") for recipe in recipes
    }
    trials = RunSet(f"{asked.name}-trials", folder, configs, _sources(asked, {recipe: recipe for recipe in recipes}))
    if asked.cluster is None:
        say(f"measuring the time of a step of {', '.join(recipes)}")
        code = trials.train_here(1)
        if code:
            raise typer.Exit(code)
    elif jobs := trials.submit(asked.cluster, asked.parallel):
        typer.echo("\n".join(jobs))
    unfinished = [recipe for recipe in recipes if not read_result(folder / recipe).is_finished]
    if unfinished:
        say(f"jobs measure the time of a step of {', '.join(unfinished)}; repeat the command when they have ended")
        return None
    return {recipe: _step_seconds(folder / recipe) for recipe in recipes}


def _step_seconds(run: Path) -> float:
    """Return the median time of the last steps of a trial."""
    records = [record for record in read_journal(RunFolder(run).metrics) if "step_seconds" in record]
    return statistics.median(record["step_seconds"] for record in records[-MEASURED_STEPS:])


def _sources(asked: _Asked, recipes: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the provenance of runs, given the recipe of each."""
    traced = {recipe: trace(find(asked.entries[recipe].recipe)) for recipe in dict.fromkeys(recipes.values())}
    return {run: traced[recipe] for run, recipe in recipes.items()}


def _runs(asked: _Asked, plan: Plan) -> RunSet:
    """Return the runs of a comparison, seed by seed, so that early results are of all recipes."""
    recipes, configs = dict[str, str](), dict[str, Config]()
    for seed in asked.seeds:
        for recipe in asked.entries:
            if recipe in plan.recipes:
                run, steps = _run_name(asked, recipe, seed), plan.recipes[recipe].steps
                fields = (f"train.steps={steps}", f"train.seed={seed}", f"run.name={run}")
                recipes[run], configs[run] = recipe, _load(asked.entries[recipe], *fields)
    return RunSet(asked.name, asked.folder, configs, _sources(asked, recipes))


def _run_name(asked: _Asked, recipe: str, seed: int) -> str:
    return f"{asked.name}-{recipe}-seed-{seed}"


def _train(asked: _Asked, plan: Plan, runs: RunSet) -> int:
    """Train the unfinished runs, or submit them; return the exit code."""
    runs = runs.tracked(plan.id, {"comparison": str(plan.budget)})
    if asked.cluster is None:
        return runs.train_here(asked.parallel or 1)
    if jobs := runs.submit(asked.cluster, asked.parallel):
        say(f"{count(len(jobs), 'job')} submitted; the same command with --show prints the results so far")
    return 0


def _results(asked: _Asked, plan: Plan, runs: RunSet) -> list[RecipeResult]:
    """Return the results of each recipe, lowest loss first."""
    with display.phase("reading the runs"):
        found = {result.run: result for result in runs.results()}
    return sort_results(
        [
            RecipeResult(
                recipe,
                plan.recipes[recipe],
                asked.seeds,
                tuple(found[_run_name(asked, recipe, seed)] for seed in asked.seeds),
            )
            for recipe in asked.entries
            if recipe in plan.recipes
        ]
    )


def _write(asked: _Asked, plan: Plan, runs: RunSet, results: Sequence[RecipeResult]) -> None:
    """Write the results and the report page to the comparison's folder."""
    replace_file(asked.folder / "results.csv", as_csv(results))
    replace_file(asked.folder / "results.json", json.dumps(as_json(str(plan.budget), results), indent=1))
    begun = [(name, runs.path_of(name)) for name in runs.configs if (runs.path_of(name) / "run.json").exists()]
    if not begun:
        return
    with display.phase("writing the report"):
        groups = {run.run: number for number, each in enumerate(results) for run in each.runs}
        costs = {run.run: each.recipe.step_flops / each.recipe.step_bytes for each in results for run in each.runs}
        remark = " ".join(_remarks(asked, plan, results))
        comparison = Comparison(asked.name, remark, HEADINGS, result_rows(results), groups, costs)
        page = page_of([read_run(path) for _, path in begun], time.time(), comparison)
        replace_file(asked.folder / "report.html", page)
    say(f"{asked.folder} has results.csv, results.json and report.html")


def _remarks(asked: _Asked, plan: Plan, results: Sequence[RecipeResult]) -> list[str]:
    """Return lines about the results, for people."""
    seeds = f"seeds {', '.join(map(str, asked.seeds))}" if len(asked.seeds) > 1 else f"seed {asked.seeds[0]}"
    lines = [
        f"Each run has the budget {plan.budget}; {seeds}. Losses are {_metrics(results)}: of the newest validation, "
        "and the mean of the last 20 training steps. A mean ± standard deviation is over the finished runs of a recipe."
    ]
    for section, fields in SHARED.items():
        trees = {
            each.name: {
                name: value for name, value in each.recipe.config[section].items() if name in (fields or (name,))
            }
            for each in results
        }
        first, *others = trees
        different = [recipe for recipe in others if trees[recipe] != trees[first]]
        if different:
            lines.append(f"The section {section} of {', '.join(different)} differs from that of {first}.")
    lines += [f"{run.run}: {problem}" for each in results for run in each.runs for problem in run.problems]
    return lines


def _metrics(results: Sequence[RecipeResult]) -> str:
    """Return the names of the losses of runs for people."""
    return " or ".join(dict.fromkeys(run.metric.replace("_", " ") for each in results for run in each.runs))
