"""Warnings about a learning rate that rises where a run resumes."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config.loading import with_overrides
from pretrain.config.schema import Config
from pretrain.training.starting.schedule_changes import describe_rise
from tests.commands import run_here
from tests.conftest import recipe_tree


def config(steps: int, rate: float = 3e-3, **schedule: Any) -> Config:
    tree = recipe_tree(Path("corpus"))
    tree["train"] = {"steps": steps, "global_batch": 6, "micro_batch": 4}
    tree["optimizer"] = {"learning_rate": rate, "schedule": {"warmup_steps": 4, **schedule}}
    return with_overrides(tree, [], "test")


schedules = st.fixed_dictionaries(
    {
        "shape": st.sampled_from(["polynomial", "cosine", "quarter_cosine", "constant", "wsd"]),
        "final_fraction": st.floats(0, 1),
    }
)


@pytest.mark.slow
@given(schedules, st.integers(1, 39), st.floats(1e-5, 1e-1))
def test_same_schedule_and_another_peak_never_warn(schedule: dict[str, Any], step: int, rate: float):
    then, now = config(40, **schedule), config(40, rate, **schedule)
    assert describe_rise(then.as_tree(), now, step) is None


@given(st.integers(1, 60))
def test_decay_that_is_moved_is_told_from_its_second_step_on(step: int):
    """The decay of 60 steps begins after step 48; a run of 100 decays after step 80."""
    then, now = config(60, shape="wsd"), config(100, shape="wsd")
    rise = describe_rise(then.as_tree(), now, step)
    assert (rise is not None) == (step > 49)  # step 49 has the whole rate
    if step == 57:
        assert rise is not None
        assert rise.startswith(
            "the learning rate rises from 0.001 in step 57 to 0.003 in step 58: it had begun to decay"
        )


@pytest.mark.parametrize("shape", ["polynomial", "cosine"])
def test_every_finished_decay_that_is_extended_is_told(shape: str):
    assert describe_rise(config(40, shape=shape).as_tree(), config(80, shape=shape), 40) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "advice"),
    [
        ("checkpoint.keep_every=4", "byteloom branch {run} --step 4 --name NEW"),
        ("checkpoint.keep=1", "keeps no checkpoint"),
    ],
)
def test_extended_wsd_run_is_warned_of_its_branch(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: str, advice: str
):
    wsd = (
        "optimizer.schedule={shape: wsd, warmup_steps: 0, decay_steps: 4}",
        "checkpoint.every=4",
        "checkpoint.keep=1",
    )
    arguments = ("train", recipe, f"run.root={tmp_path}", "validation.shards=null", *wsd, kept)
    assert run_here(*arguments, "train.steps=8")[0] == 0
    assert not [each for each in caplog.records if "rises" in each.message]
    assert run_here(*arguments, "train.steps=12")[0] == 0
    [warning] = [each for each in caplog.records if "rises" in each.message]
    assert warning.levelname == "WARNING" and "rises from 0.00075 in step 8 to 0.003 in step 9" in warning.message
    assert advice.format(run=tmp_path / "run") in warning.message
