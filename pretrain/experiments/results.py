"""Results of a set of runs: one row a run, and the mean and spread of each recipe, as text, CSV and JSON."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.experiments.plan import PlannedRecipe
from pretrain.terminal.losses import BITS_PER_BYTE
from pretrain.terminal.progress import duration, size
from pretrain.terminal.tables import Table, figure
from pretrain.tracking.journal import read_journal
from pretrain.training.run_folder import RunFolder
from pretrain.training.run_status import status_of

AVERAGED = 20
"""Last steps over which the training loss is averaged."""
WAITING = "waiting"
"""State of a run that has not begun."""


@dataclass(frozen=True)
class RunResult:
    """State and numbers of one run. Unknown values are None."""

    run: str
    state: str
    step: int
    steps: int | None
    training_loss: float | None
    """Mean of the last AVERAGED steps."""
    validation_loss: float | None
    """Newest validation."""
    seconds: float
    """Time of all steps, without validations and checkpoints."""
    metric: str = BITS_PER_BYTE
    """Name of the loss, which the objective decides."""
    problems: tuple[str, ...] = ()
    """Files that are damaged or cannot be read, a line each."""

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return self.steps is not None and self.step == self.steps


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of the finished runs of a recipe."""

    mean: float
    deviation: float | None
    """None for one run."""
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


@dataclass(frozen=True)
class RecipeResult:
    """Cost and results of one recipe of a comparison."""

    name: str
    recipe: PlannedRecipe
    seeds: tuple[int, ...]
    runs: tuple[RunResult, ...]
    """One a seed."""

    @property
    def finished(self) -> list[RunResult]:
        """Finished runs."""
        return [run for run in self.runs if run.is_finished]

    def spread(self, column: str) -> Spread | None:
        """Return mean and deviation of a number of the finished runs; None if none has it."""
        values = [value for run in self.finished if (value := getattr(run, column)) is not None]
        if not values:
            return None
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def read_result(run: Path) -> RunResult:
    """Return the state and the numbers of a run, which may not have begun."""
    folder = RunFolder(run)
    if not any((run / name).exists() for name in ("run.json", "launches.jsonl")):
        return RunResult(run.name, WAITING, 0, None, None, None, 0.0)
    status, problems = status_of(run), list[str]()
    loss = f"train/{status.metric}"
    trained = [record for record in read_journal(folder.metrics, problems.append) if loss in record]
    last = [record[loss] for record in trained[-AVERAGED:]]
    return RunResult(
        run.name,
        status.state,
        status.step,
        status.steps,
        statistics.fmean(last) if last else None,
        status.validation_loss,
        math.fsum(record["step_seconds"] for record in trained),
        status.metric,
        tuple(dict.fromkeys([*status.problems, *problems])),
    )


def loss_of(run: RunResult) -> float | None:
    """Return the loss by which runs are sorted: of the newest validation, else of the last training steps."""
    return run.training_loss if run.validation_loss is None else run.validation_loss


def run_table(runs: Sequence[RunResult]) -> Table:
    """Return a table with a row for each run, the lowest loss first, then those without a loss."""
    ordered = sorted(runs, key=lambda run: (loss_of(run) is None, not run.is_finished, loss_of(run) or 0.0))
    numbers = ["validation", "training", "step", "time"]
    table = Table("", ["run", *numbers, "state"], numbers)
    for run in ordered:
        table.add_row(
            run.run,
            _bits(run.validation_loss),
            _bits(run.training_loss),
            f"{run.step:,}/{'?' if run.steps is None else f'{run.steps:,}'}",
            duration(run.seconds),
            run.state,
        )
    return table


def sort_results(results: Sequence[RecipeResult]) -> list[RecipeResult]:
    """Return results with the lowest loss first: of validations if all recipes have one, else of training."""
    validated = all(each.spread("validation_loss") for each in results)
    column = "validation_loss" if validated else "training_loss"

    def key(each: RecipeResult) -> tuple[bool, float]:
        found = each.spread(column)
        return found is None, 0.0 if found is None else found.mean

    return sorted(results, key=key)


HEADINGS = ["recipe", "validation", "training", "parameters", "steps", "bytes", "FLOPs", "time", "runs"]


def result_rows(results: Sequence[RecipeResult]) -> list[list[str]]:
    """Return the cells under HEADINGS for each recipe."""
    rows = []
    for each in results:
        planned, seconds = each.recipe, each.spread("seconds")
        rows.append(
            [
                each.name,
                str(each.spread("validation_loss") or ""),
                str(each.spread("training_loss") or ""),
                f"{planned.parameters:,}",
                f"{planned.steps:,}",
                size(planned.steps * planned.step_bytes),
                figure(planned.steps * planned.step_flops),
                "" if seconds is None else duration(seconds.mean),
                f"{len(each.finished)} of {len(each.runs)}",
            ]
        )
    return rows


def result_table(results: Sequence[RecipeResult]) -> Table:
    """Return a table with a row for each recipe, without columns that are empty for all."""
    rows = result_rows(results)
    kept = [index for index in range(len(HEADINGS)) if any(row[index] for row in rows)]
    names = [HEADINGS[index] for index in kept]
    table = Table("", names, [name for name in names if name not in ("recipe", "runs")])
    for row in rows:
        table.add_row(*(row[index] for index in kept))
    return table


def as_json(budget: str, results: Sequence[RecipeResult]) -> dict[str, Any]:
    """Return the results as JSON values."""
    return {
        "budget": budget,
        "recipes": [
            {
                "name": each.name,
                **each.recipe.model_dump(mode="json", exclude={"config"}),
                "bytes": each.recipe.steps * each.recipe.step_bytes,
                "flops": each.recipe.steps * each.recipe.step_flops,
                **{
                    column: None if (found := each.spread(column)) is None else asdict(found)
                    for column in ("validation_loss", "training_loss", "seconds")
                },
                "runs": [{"seed": seed, **asdict(run)} for seed, run in zip(each.seeds, each.runs, strict=True)],
            }
            for each in results
        ],
    }


def as_csv(results: Sequence[RecipeResult]) -> str:
    """Return the results as CSV, with a row for each run."""
    fields = ["run", "state", "step", "metric", "training_loss", "validation_loss", "seconds"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["recipe", "seed", "parameters", "steps", "bytes", "flops", *fields])
    for each in results:
        planned = each.recipe
        of_recipe = [planned.parameters, planned.steps, planned.steps * planned.step_bytes]
        for seed, run in zip(each.seeds, each.runs, strict=True):
            values = ["" if (value := getattr(run, name)) is None else value for name in fields]
            writer.writerow([each.name, seed, *of_recipe, planned.steps * planned.step_flops, *values])
    return out.getvalue()


def _bits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
