"""Runs that meet bad batches: each ends as a clean run that never saw the offending rows."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byteloom.core.storage.step_folders import step_in
from data_pipeline.stream.skips import Skips
from pretrain.checkpoint import CheckpointStore
from pretrain.checkpoint.homes.folder import REASON
from pretrain.cli.corpora.inspect import past_reading, replay
from pretrain.distributed.fragments import Fragment
from pretrain.distributed.world import ALONE
from pretrain.engines import StepResult, UpdateLimits
from pretrain.training.health import HealthConfig, HealthLog
from pretrain.training.health.monitor import Monitor, limit_of
from tests.commands import run_here as command
from tests.distributed.ranks import on_ranks
from tests.health_runs import (
    BATCH,
    STEPS,
    assert_same_run,
    event_of,
    events_of,
    last_state,
    make_corpus,
    numbers_of,
    train_clean,
    train_poisoned,
    train_run,
    write_recipe,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("poison"))


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e5, math.nan, math.inf])
def test_skipped_batch_leaves_the_run_as_if_it_had_never_been_read(corpus: Path, tmp_path: Path, factor: float):
    recipe = write_recipe(tmp_path, corpus)
    assert train_poisoned(ALONE, recipe, factor=factor) == ""
    events = events_of(tmp_path / "run")
    assert events and {event.action for event in events} == {"skip"}
    assert {event.kind for event in events} == {"gradient_norm" if factor == 1e5 else "non_finite"}
    assert all(length == BATCH for event in events for _, length in event.sequences)
    skipped = [each for event in events for each in event.sequences]
    assert last_state(tmp_path / "run")["reading"]["skipped"] == [list(each) for each in Skips(skipped).ranges]
    assert any("poison-0.txt" in key for event in events for row in event.rows for key in row.documents)
    assert train_clean(ALONE, recipe, "clean", skipped) == ""
    assert_same_run(tmp_path / "run", tmp_path / "clean")


def assert_replays(run: Path) -> None:
    past = past_reading(str(run), [])
    assert replay(past.reading, 1, lambda done: None) == past.reading.record.digest


@pytest.mark.slow
def test_run_that_was_interrupted_decides_as_the_whole_run(corpus: Path, tmp_path: Path):
    """The window is in the checkpoint. One start ends just before the bad batch, and another one just after it."""
    recipe = write_recipe(tmp_path, corpus)
    assert train_poisoned(ALONE, recipe, ["run.name=whole"]) == ""
    assert train_poisoned(ALONE, recipe, until=[1, 4, 5]) == ""
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert_same_run(run, whole)
    assert [event.text for event in events_of(run)] == [event.text for event in events_of(whole)]
    states = [last_state(each)["health"] for each in (run, whole)]
    assert states[0]["bits_per_byte"] == states[1]["bits_per_byte"]
    assert_replays(run)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, None])
def test_rewound_run_equals_a_clean_one(corpus: Path, tmp_path: Path, keep: int | None):
    recipe = write_recipe(tmp_path, corpus, spike="rewind", rate_factor=1.0, rewinds=9)
    assert train_poisoned(ALONE, recipe, [f"checkpoint.keep={json.dumps(keep)}"]) == ""
    run, events = tmp_path / "run", events_of(tmp_path / "run")
    assert events[0].action == "rewind" and events[0].step == 5 and events[0].to_step == 2, events[0]
    assert "the run rewinds to step 2 (1 of 9), without 6 sequences" in events[0].text
    assert (
        events[1].to_step == 0 and "the run rewinds to the beginning (2 of 9), without 12 sequences" in events[1].text
    )
    skipped = last_state(run)["reading"]["skipped"]
    assert train_clean(ALONE, recipe, "clean", skipped) == ""
    assert_same_run(run, tmp_path / "clean")
    assert_replays(run)
    left = run / "checkpoints/step-00000004.invalid"
    assert left.exists() and "the run was rewound" in (left / REASON).read_text()


@pytest.mark.slow
def test_patience_ends_with_a_rewind_at_a_lower_rate(corpus: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path, corpus, patience=2, rate_steps=1)
    assert train_poisoned(ALONE, recipe) == ""
    run = tmp_path / "run"
    assert [(event.action, event.step) for event in events_of(run)] == [("skip", 5), ("rewind", 5)]
    rates = {step: numbers["learning_rate"] for step, numbers in numbers_of(run)}
    clean = tmp_path / "clean"
    assert train_clean(ALONE, recipe, "clean", last_state(run)["reading"]["skipped"]) == ""
    full = {step: numbers["learning_rate"] for step, numbers in numbers_of(clean)}
    to_step = events_of(run)[-1].to_step
    assert to_step is not None
    lower = range(to_step + 1, 5 + 1 + 1)
    assert rates == {step: rate * (0.5 if step in lower else 1) for step, rate in full.items()}
    assert numbers_of(run)[-1][1]["train/bits_per_byte"] == pytest.approx(
        numbers_of(clean)[-1][1]["train/bits_per_byte"], rel=0.1
    )


@pytest.mark.slow
def test_run_stops_when_it_has_skipped_enough(corpus: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path, corpus, skips=1)
    message = train_poisoned(ALONE, recipe)
    assert "step 5, sequences 30 to 35: gradient norm" in message and "times the median of the last 2 steps" in message
    assert "weights and moments after step 4 are finite" in message, message
    assert f"`byteloom health {tmp_path / 'run'}` names" in message and "raise health.norm_deviations" in message
    assert [event.action for event in events_of(tmp_path / "run")] == ["skip", "stop"]
    code, output = command("health", tmp_path / "run", "--json")
    assert code == 0
    shown = json.loads(output)
    assert [(event["step"], event["sequences"]) for event in shown] == [(5, [[24, 6]]), (5, [[30, 6]])]
    assert "texts/poison-0.txt" in {key for event in shown for row in event["rows"] for key in row["documents"]}
    code, output = command("health", tmp_path / "run")
    assert code == 0 and "poison-0.txt" in output and "update skipped (1 of 1)" in output


@pytest.mark.slow
@pytest.mark.parametrize("save", [2, STEPS // 2], ids=["in mid-run", "after the last step"])
def test_infinite_moment_is_undone_by_a_rewind(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: int
):
    recipe = write_recipe(tmp_path, corpus)
    assert train_run(recipe, ["run.name=clean"]) == ""
    stage, saves = CheckpointStore._stage, itertools.count(1)

    def poison(store: CheckpointStore, fragments: Sequence[Fragment]) -> Any:
        if next(saves) == save:
            next(each for each in fragments if each.name.startswith("exp_avg_sq/")).data[0] = math.inf
        return stage(store, fragments)

    monkeypatch.setattr(CheckpointStore, "_stage", poison)
    assert train_run(recipe) == ""
    [event] = events_of(tmp_path / "run")
    assert (event.kind, event.action, event.to_step, event.sequences) == ("values", "rewind", 2 * (save - 1), [])
    assert_same_run(tmp_path / "run", tmp_path / "clean")


@pytest.mark.slow
def test_healthy_run_is_the_same_with_and_without_health(corpus: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path, corpus)
    for name, options in (("watched", []), ("not", ["health.spike=ignore"])):
        assert train_run(recipe, [f"run.name={name}", *options]) == ""
    assert_same_run(tmp_path / "watched", tmp_path / "not")
    assert events_of(tmp_path / "watched") == []


@pytest.mark.slow
def test_too_high_a_rate_ends_near_the_loss_of_a_good_rate(corpus: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path, corpus, rewinds=9, rate_factor=0.01, rate_steps=100, patience=1)
    assert train_run(recipe, ["run.name=good"]) == ""
    assert train_run(recipe, ["optimizer.learning_rate=100.0", "run.name=high"]) == ""
    events = events_of(tmp_path / "high")
    assert events and {event.action for event in events} == {"rewind"}
    good, high = (numbers_of(tmp_path / name)[-1][1]["train/bits_per_byte"] for name in ("good", "high"))
    assert high < 1.1 * good, [event.text for event in events]


@pytest.mark.slow
@pytest.mark.parametrize("good", [4, 0])
def test_rate_that_breaks_a_run_leaves_the_last_good_checkpoint_as_the_newest(corpus: Path, tmp_path: Path, good: int):
    """Steps with the rate 1e30 have finite weights that no later step can use; checkpoints of them do not stay."""
    recipe, keep = write_recipe(tmp_path, corpus), ["checkpoint.keep=1", "checkpoint.every=1"]
    if good:
        assert train_run(recipe, [f"train.steps={good}", *keep]) == ""
    message = train_run(recipe, ["optimizer.learning_rate=1e30", *keep])
    expected = f"the next start {f'resumes after step {good}' if good else 'begins at step 1'}"
    assert message.endswith(expected), message
    assert f"weights and moments after step {good + 1} are finite" in message
    steps = [step_in(path.name) for path in CheckpointStore(tmp_path / "run/checkpoints", keep=None).committed()]
    assert max(steps, default=0) == good
    assert train_run(recipe, keep) == ""
    assert [step for step, _ in numbers_of(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert_replays(tmp_path / "run")


@pytest.mark.slow
def test_branch_never_rewinds_to_before_its_first_checkpoint(corpus: Path, tmp_path: Path):
    recipe, options = write_recipe(tmp_path, corpus, spike="rewind", rate_factor=1.0, rewinds=9), ["run.name=branch"]
    assert train_run(recipe, ["train.steps=4"]) == ""
    code, output = command("branch", tmp_path / "run", "--step", 4, "--name", "branch", f"train.steps={STEPS}")
    assert code == 0, output
    assert train_poisoned(ALONE, recipe, options) == ""
    assert [(event.step, event.to_step) for event in events_of(tmp_path / "branch")] == [(5, 4), (5, 4)]
    assert_replays(tmp_path / "branch")


def test_skip_that_a_checkpoint_knows_stays_in_the_log(tmp_path: Path):
    """A run that is stopped after a skip saves the step before it, and does not decide about the batch again."""
    log = HealthLog(tmp_path / "health.jsonl")
    known, later = event_of(step=5), event_of(id="later", step=5)
    state = {"reading": {"step": 4}, "health": {"events": [known.as_json()]}}
    for event in (known, later):
        log.append(event)
    log.keep_until(state)
    assert log.read() == [known]
    log.keep_until({})
    assert log.read() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "ranks", "spike"),
    [("ddp", 3, "skip"), ("fsdp", 2, "skip"), ("zero3", 2, "skip"), ("zero3", 2, "rewind")],
)
def test_ranks_skip_together_and_end_as_a_clean_run(corpus: Path, tmp_path: Path, engine: str, ranks: int, spike: str):
    recipe = write_recipe(tmp_path, corpus, spike=spike, rate_factor=1.0, rewinds=9)
    options = [f"engine.name={engine}"]
    assert on_ranks(ranks, train_poisoned, recipe, options) == [""] * ranks
    run = tmp_path / "run"
    events = events_of(run)
    assert {event.action for event in events} == {spike} and events[0].sequences == [(24, 6)]
    assert (
        on_ranks(ranks, train_clean, recipe, "clean", last_state(run)["reading"]["skipped"], *options) == [""] * ranks
    )
    assert_same_run(run, tmp_path / "clean")
    assert_replays(run)


def result_of(loss: float, norm: float) -> StepResult:
    return StepResult(loss * math.log(2), 1, norm, [])


@given(values=st.lists(st.floats(0.1, 100), min_size=1), deviations=st.floats(6, 30))
def test_limit_is_above_the_median_and_scales_with_the_numbers(values: list[float], deviations: float):
    limit = limit_of(values, deviations, 0.05)
    middle = sorted(values)[len(values) // 2]
    assert limit > min(values)
    assert limit_of([2 * value for value in values], deviations, 0.05) == pytest.approx(2 * limit)
    assert limit_of([middle] * 9, deviations, 0.05) == pytest.approx(middle * (1 + 0.05 * deviations))


@given(losses=st.lists(st.floats(0.5, 8), max_size=30), cut=st.integers(0, 30))
def test_monitor_resumes_exactly(losses: list[float], cut: int):
    config = HealthConfig(window=8)
    whole, first = Monitor(config, {}), Monitor(config, {})
    for number, loss in enumerate(losses):
        whole.accept(result_of(loss, 2 * loss), stages=1 + (number >= 20))
        if number < cut:
            first.accept(result_of(loss, 2 * loss), stages=1 + (number >= 20))
    resumed = Monitor(config, json.loads(json.dumps(first.state(cut))))
    for number, loss in list(enumerate(losses))[cut:]:
        resumed.accept(result_of(loss, 2 * loss), stages=1 + (number >= 20))
    assert resumed.limits == whole.limits and resumed.state(30) == whole.state(30)


def test_few_steps_set_no_limit_and_a_new_stage_begins_a_new_window():
    monitor = Monitor(HealthConfig(window=8), {})
    for number in range(4):
        assert monitor.limits == UpdateLimits(), number
        monitor.accept(result_of(4.0, 1.0), stages=1)
    assert monitor.limits == UpdateLimits(pytest.approx(6.0 * math.log(2)), pytest.approx(6.0))
    monitor.accept(result_of(4.0, 1.0), stages=2)
    assert monitor.limits == UpdateLimits()


def test_good_checkpoint_has_a_healthy_window_after_it():
    monitor = Monitor(HealthConfig(window=8), {})
    assert monitor.healthy_step(7) < 0 and monitor.healthy_step(30) == 22
    monitor.events += [event_of(step=31)]
    assert [monitor.healthy_step(step) for step in (30, 34, 37, 38)] == [22, 22, 22, 30]
    assert monitor.kept_steps(34)([2, 10, 20, 24, 30, 34]) == [20, 24]
    assert monitor.kept_steps(6)([2, 3, 5, 6]) == [5]  # nothing looks for spikes before step 4
    assert monitor.rewind_step("loss", 34, [10, 20, 30, 34]) == 20
    assert monitor.rewind_step("loss", 34, [26, 30, 34]) == 30  # none is good, so the last one before the trouble
    assert monitor.rewind_step("loss", 34, [32]) == 0 and monitor.rewind_step("loss", 80, [81]) is None
    monitor.events += [event_of(step=35, action="rewind", to_step=30)]
    assert monitor.rewind_step("loss", 33, [26, 30, 32]) == 26  # that rewind has not helped
    assert monitor.rewind_step("loss", 36, [26, 30]) == 30
    assert monitor.rewind_step("loss", 33, [26, 28, 30], floor=28) == 28
    assert monitor.rewind_step("loss", 33, [26, 30], floor=30) == 30  # there is no earlier one
    assert monitor.rewind_step("loss", 33, [26], floor=30) is None
