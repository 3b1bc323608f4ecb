"""Recipes of budgets: they load, cost what the budget pays for, and fit into the memory."""

import math
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config.loading import load
from pretrain.config.schema import Config
from pretrain.engines import compute_dtype, gpu_precision
from pretrain.estimate.activations import measure_activations, on_meta
from pretrain.estimate.states import USABLE, states_on_rank
from pretrain.experiments.budget import cost_of
from pretrain.experiments.budget_recipe import recipe_of, write_budget_recipe
from pretrain.experiments.sizing import (
    BYTES_PER_PARAMETER,
    WIDTH_STEP,
    BudgetError,
    DeviceBudget,
    SizedRun,
    batch_of,
    layers_of,
    rate_of,
    size_run,
)
from pretrain.optim.scaling import scale_model
from tests.conftest import Run

GIB = 2**30


def planned(family: str, flops: float, memory: float, gpus: int = 1) -> tuple[SizedRun, Config]:
    """Return the run of a budget, and the config of its recipe."""
    devices = DeviceBudget(memory * GIB, gpus)
    run = size_run(family, flops, devices)
    return run, Config.model_validate(recipe_of(run, "run", "corpus", devices))


def held(config: Config, gpus: int) -> int:
    """Return the bytes on each GPU, without the lines by which the run was chosen."""
    dtype, engine = compute_dtype(gpu_precision("auto")), config.engine
    states = sum(states_on_rank(engine, config.optimizer.entry, on_meta(config.model), dtype, gpus, passes=2))
    found = measure_activations(config.model, config.train.micro_batch, dtype, engine.activation_checkpointing)
    return states + (found.gathering if engine.name == "fsdp" else found.peak)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "flops"),
    [
        pytest.param("blt", 1e14, marks=pytest.mark.long),
        pytest.param("hnet", 1e15, marks=pytest.mark.long),
        pytest.param("mamba", 3e13, marks=pytest.mark.long),
        ("megabyte", 1e15),
        ("perceiver_ar", 1e14),
        pytest.param("spacebyte", 1e14, marks=pytest.mark.long),
        ("transformer", 1e15),
        ("transformer_xl", 1e13),
    ],
)
def test_recipe_costs_its_budget_fits_into_memory_and_can_be_scaled(family: str, flops: float, tmp_path: Path):
    run, config = planned(family, flops, 16)
    assert run.steps * cost_of(config).flops == run.flops == pytest.approx(flops, rel=0.02)
    assert held(config, 1) == pytest.approx(run.device_bytes, rel=0.1)
    assert run.device_bytes <= USABLE * 16 * GIB
    assert 0.4 < run.bytes / run.parameters / BYTES_PER_PARAMETER < 2.5  # widths have steps of 64
    scale_model(on_meta(config.model), config.model, config.optimizer)
    file = tmp_path / "my.yaml"
    write_budget_recipe(recipe_of(run, "run", "corpus", DeviceBudget(16 * GIB)), file, "byteloom recipe")
    assert load(file) == config


@pytest.mark.slow
def test_too_little_memory_leads_to_recomputation_then_to_shards_then_to_narrower_models():
    ample, _ = planned("transformer", 1e15, 16)
    assert (ample.checkpointing, ample.engine, ample.size) == ("none", "ddp", ample.wanted)
    states = 18 * ample.parameters / GIB  # bf16 weights, fp32 gradients, masters and two moments
    usable = 0.99 * states
    short, config = planned("transformer", 1e15, usable / USABLE)
    assert short.size.width < ample.size.width == short.wanted.width
    assert held(config, 1) <= usable * GIB
    assert short.size.width == ample.size.width - WIDTH_STEP  # the widest that fits
    sharded, config = planned("transformer", 1e15, usable / USABLE, gpus=4)
    assert (sharded.engine, sharded.size) == ("fsdp", ample.size)
    assert config.launch.processes == 4 and config.train.global_batch % (4 * config.train.micro_batch) == 0
    with pytest.raises(BudgetError, match="not even a transformer of 64 channels"):
        planned("transformer", 1e13, 0.001)


def test_family_without_sizes_is_refused():
    with pytest.raises(BudgetError, match="the family encoder declares no sizes; use blt, hnet, mamba"):
        size_run("encoder", 1e15, DeviceBudget(GIB))


@pytest.mark.parametrize(
    ("flops", "reason"),
    [
        (0, "0 FLOPs are less than one step: a row of 512 bytes costs"),
        (1e5, "less than one step"),
        pytest.param(1e30, r"1e\+30 FLOPs ask for a transformer of more than 16,384 channels", marks=pytest.mark.slow),
    ],
)
def test_budget_of_less_than_a_step_or_of_more_than_the_widest_model_is_refused(flops: float, reason: str):
    with pytest.raises(BudgetError, match=reason):
        size_run("transformer", flops, DeviceBudget(80 * GIB))


@pytest.mark.long
def test_budget_of_more_rows_than_a_run_can_read_is_refused():
    with pytest.raises(BudgetError, match=r"pay for .* rows with a spacebyte of .* a run can read 274,877,906,944"):
        size_run("spacebyte", 1e25, DeviceBudget(GIB))


def test_depth_is_that_of_gpt_3():
    """Brown et al. 2020, table 2.1: 125 million to 1.3 billion parameters."""
    assert [layers_of(width) for width in (768, 1024, 2048)] == [12, 16, 24]


@given(st.floats(1e6, 1e13), st.floats(1.1, 100))
def test_more_bytes_have_larger_batches_and_more_steps_and_no_jump_of_the_rate(run_bytes: float, factor: float):
    small, large = (batch_of(each, 1) for each in (run_bytes, factor * run_bytes))
    assert small <= large
    assert run_bytes / small <= 1.01 * factor * run_bytes / large
    rates = [rate_of(each, batch_of(each, 1)) for each in (run_bytes, 1.01 * run_bytes)]
    assert math.isclose(*rates, rel_tol=0.02)
    assert 5e-4 < rates[0] < 5e-3


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_command_writes_a_recipe_that_the_loader_reads(byteloom: Run, tmp_path: Path):
    arguments = ("recipe", "--family", "mamba", "--flops", "1.0001e12", "--sequence-length", "64", "--memory", "4")
    arguments += ("--shards", "a corpus")
    shown = byteloom(*arguments, "--out", "mine.yaml", env={"COLUMNS": "100"}).stdout
    assert "training" in shown and "1e12 FLOPs" in shown
    made_by = re.search("^# Made by `byteloom (.*)`", (tmp_path / "mine.yaml").read_text(), re.MULTILINE)
    assert made_by is not None
    words = shlex.split(made_by[1])
    assert float(words[words.index("--flops") + 1]) == 1.0001e12 and words[-1] == "a corpus"
    config = load(tmp_path / "mine.yaml")
    assert (config.run.name, config.model.sequence_length, config.optimizer.scaling) == ("mine", 64, "mup")
    refused = byteloom(*arguments, "--out", "mine.yaml", check=False)
    assert refused.returncode and "exists already" in refused.stderr
