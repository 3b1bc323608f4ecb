"""Budgets of comparisons: steps that they pay for, and results."""

import csv
import io
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.common.compared import CONTEXT, SMALL, flops_per_byte, model_tree
from pretrain.config.errors import ConfigError
from pretrain.config.loading import load
from pretrain.estimate.activations import on_meta
from pretrain.experiments.budget import Budget, StepCost, cost_of
from pretrain.experiments.plan import Plan, PlannedRecipe, check_same, lasting_fields, read_plan, save_plan
from pretrain.experiments.results import (
    RecipeResult,
    RunResult,
    as_csv,
    as_json,
    result_rows,
    run_table,
    sort_results,
)


@settings(max_examples=50, deadline=None)
@given(st.floats(1, 1e6), st.integers(1, 10**6))
def test_steps_cost_the_budget_to_half_a_step(steps: float, cost: int):
    budget = Budget(kind="bytes", amount=steps * cost)
    found = budget.steps("it", StepCost(1, 1, cost)) if budget.amount >= cost else 1
    assert abs(found * cost - budget.amount) <= cost * (0.5 + 1e-9 * steps)


def test_recipe_whose_step_costs_more_than_the_budget_is_refused_by_name():
    budget = Budget(kind="flops", amount=1e6)
    with pytest.raises(
        ConfigError, match=r"large cannot fit the budget --flops 1e\+06: one step takes 1.234e\+06 FLOP"
    ):
        budget.steps("large", StepCost(1, 1_234_000, 1))


def test_cost_of_a_step_is_three_forward_passes_over_the_batch():
    config = load("debug")
    cost, model = cost_of(config), on_meta(config.model)
    rows, length = config.train.global_batch, config.model.sequence_length
    assert cost.flops == 3 * rows * model.flops(length)
    assert (cost.bytes, cost.parameters) == (rows * length, model.parameter_count())


@pytest.mark.slow
def test_published_comparison_has_the_steps_of_its_table():
    """Steps of docs/lab/results.md, from the FLOPs of 600 steps of MEGABYTE with 8 rows of 1,024 bytes."""
    trees = {name: model_tree("small", name, CONTEXT) for name in SMALL}
    budget = Budget(kind="flops", amount=flops_per_byte(trees["MEGABYTE"]) * 8 * CONTEXT * 600)
    steps = {}
    for name in ("MEGABYTE", "Perceiver AR", "Transformer", "Transformer, window 128", "Transformer-XL"):
        config = load("comparison", [f"model={json.dumps(trees[name])}"])
        steps[name] = budget.steps(name, cost_of(config))
    assert list(steps.values()) == [600, 623, 600, 605, 584]
    assert f"{budget.amount:.1e}" == "4.9e+13"


def planned(steps: int = 10) -> PlannedRecipe:
    config = lasting_fields(load("debug"))
    return PlannedRecipe(recipe="debug", config=config, parameters=7, steps=steps, step_flops=100, step_bytes=50)


def run(name: str, step: int, training: float | None, validation: float | None = None) -> RunResult:
    state = "finished" if step == 10 else "stopped"
    return RunResult(name, state, step, 10, training, validation, float(step))


RESULTS = [
    RecipeResult("worse", planned(), (0, 1), (run("w0", 10, 3.0), run("w1", 10, 2.5))),
    RecipeResult("none", planned(), (0, 1), (run("n0", 4, 1.0), run("n1", 0, None))),
    RecipeResult("better", planned(), (0, 1), (run("b0", 10, 2.0), run("b1", 9, 0.5))),
]


def test_mean_and_spread_are_of_finished_runs_and_the_lowest_mean_is_first():
    ordered = sort_results(RESULTS)
    assert [each.name for each in ordered] == ["better", "worse", "none"]
    better, worse, none = (each.spread("training_loss") for each in ordered)
    assert (better.mean, better.deviation, better.runs) == (2.0, None, 1)
    assert (worse.mean, worse.deviation) == (2.75, statistics.stdev([3.0, 2.5]))
    assert none is None
    assert [row[-1] for row in result_rows(ordered)] == ["1 of 2", "2 of 2", "0 of 2"]
    assert result_rows(ordered)[1][2] == "2.7500 ± 0.3536"


def test_csv_and_json_have_every_run_with_the_same_numbers():
    rows = list(csv.DictReader(io.StringIO(as_csv(RESULTS))))
    tree = json.loads(json.dumps(as_json("--flops 1000", RESULTS)))
    runs = [(each, one) for each in tree["recipes"] for one in each["runs"]]
    assert len(rows) == len(runs) == 6
    for row, (each, one) in zip(rows, runs, strict=True):
        assert (row["recipe"], row["run"], int(row["seed"])) == (each["name"], one["run"], one["seed"])
        assert row["training_loss"] == str(one["training_loss"] or "")
        assert (int(row["flops"]), int(row["bytes"])) == (each["flops"], each["bytes"]) == (1000, 500)


def test_runs_of_a_sweep_are_sorted_by_loss_and_runs_without_one_come_last():
    lines = run_table([run("a", 10, None), run("b", 10, 3.0, 2.0), run("c", 10, 1.5), run("d", 10, 2.5)]).lines(None)
    assert [line.split()[0] for line in lines[2:]] == ["c", "b", "d", "a"]


def test_plan_refuses_another_budget_and_another_recipe_by_name(tmp_path: Path):
    budget = Budget(kind="flops", amount=1e12)
    plan = read_plan(tmp_path, budget)
    plan.recipes["debug"] = planned()
    save_plan(tmp_path, plan)
    assert read_plan(tmp_path, budget) == plan
    with pytest.raises(ConfigError, match=r"began with the budget --flops 1e\+12, and this command has --bytes 5"):
        read_plan(tmp_path, Budget(kind="bytes", amount=5))
    free = ["train.steps=70", "train.seed=3", "loader.threads=1", "tracking.enabled=false"]
    free += ["checkpoint.every=9", "samples.every=18"]
    check_same(tmp_path, "debug", plan.recipes["debug"], load("debug", free))
    with pytest.raises(ConfigError, match=r"recipe debug has changed since .*: model.patch_size: 8 -> 4; restore it"):
        check_same(tmp_path, "debug", plan.recipes["debug"], load("debug", ["model.patch_size=4"]))
    assert isinstance(plan, Plan)


def test_plan_of_an_earlier_version_fits_recipes_with_newer_fields(tmp_path: Path):
    """A field that the stored config lacks has its default there."""
    stored = {name: section for name, section in planned().config.items() if name != "finetune"}
    stored["model"] = {name: value for name, value in stored["model"].items() if name != "dropout"}
    earlier = planned().model_copy(update={"config": stored})
    check_same(tmp_path, "debug", earlier, load("debug"))
    with pytest.raises(ConfigError, match=r"has changed since .*: model.dropout: 0\.\d -> 0\.5"):
        check_same(tmp_path, "debug", earlier, load("debug", ["model.dropout=0.5"]))
    gone = planned().model_copy(update={"config": stored | {"gone": {"field": 1}}})
    with pytest.raises(ConfigError, match="gone"):
        check_same(tmp_path, "debug", gone, load("debug"))
