"""Norms by layer, gradient noise and patches: the same under every engine, and no change of a step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.distributed.world import ALONE, World
from pretrain.engines import StepResult, Upcoming
from pretrain.engines.diagnosis import noise_numbers
from tests.distributed.parity import MICRO_BATCH, ROWS, build, micro_batches
from tests.distributed.ranks import on_ranks

STEP = {"step": 0, "learning_rate": 1e-3}
NO_DROPOUT = {"dropout": 0.0}
ENGINES = {"pytorch": ("ddp", "fsdp"), "deepspeed": ("zero1", "zero2", "zero3")}


def step_of(world: World = ALONE, family: str = "transformer", *, diagnose: bool = True, **engine: Any) -> StepResult:
    """Take a step that looks ahead, as the steps of several ranks do."""
    built = build(family, world, changes=NO_DROPOUT, **engine)
    built.rehearse(1)  # as every start does
    ahead = partial(Upcoming, [], (world.rank,))
    return built.train_step(micro_batches(0, world), **STEP, diagnose=diagnose, look_ahead=ahead)


def steps_of(world: World, engines: Sequence[str], families: Sequence[str]) -> dict[tuple[str, str], StepResult]:
    return {(family, name): step_of(world, family, name=name) for family in families for name in engines}


def add_up(result: StepResult, kind: str) -> float:
    return math.sqrt(sum(norm**2 for name, norm in result.diagnosis.items() if name.startswith(f"{kind}/")))


@pytest.fixture(scope="module")
def alone() -> StepResult:
    return step_of()


@pytest.fixture(scope="module")
def with_patches() -> StepResult:
    return step_of(family="spacebyte")


def test_measurement_changes_no_number_of_a_step(alone: StepResult):
    assert step_of(diagnose=False) == replace(alone, diagnosis={})
    assert not step_of(diagnose=False).diagnosis


def test_norms_of_layers_add_up_to_the_norm_of_the_gradient(alone: StepResult):
    assert add_up(alone, "layer_gradient_norm") == pytest.approx(alone.gradient_norm, rel=1e-5)
    assert {"layer_gradient_norm/stack.blocks.0", "layer_weight_norm/stack.blocks.0"} <= alone.diagnosis.keys()


def test_noise_is_that_of_the_gradient_of_each_micro_batch(alone: StepResult):
    """A step on one micro-batch has its gradient, so its norm is what the noise is estimated from."""
    squares, inverse_sizes = [], []
    for batch in micro_batches(0):
        engine = build("transformer", changes=NO_DROPOUT)
        result = engine.train_step([replace(batch, index=0)], **STEP)
        squares.append(result.gradient_norm**2)
        inverse_sizes.append(1 / result.target_bytes)
    assert len(squares) == -(-ROWS // MICRO_BATCH)
    expected = noise_numbers((sum(squares), sum(inverse_sizes), len(squares)), alone.gradient_norm, alone.target_bytes)
    assert len(expected) >= 2
    assert {name: alone.diagnosis[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("library", ["pytorch", pytest.param("deepspeed", marks=pytest.mark.long)])
def test_ranks_measure_what_one_process_does(alone: StepResult, with_patches: StepResult, library: str):
    expected = {"transformer": alone, "spacebyte": with_patches}
    for results in on_ranks(2, steps_of, ENGINES[library], tuple(expected)):
        for (family, name), result in results.items():
            assert result.nats == pytest.approx(expected[family].nats, rel=1e-6), name
            assert result.upcoming == [[0], [1]], name
            assert dict(result.diagnosis) == pytest.approx(dict(expected[family].diagnosis), rel=1e-3), name
            assert result.patches == expected[family].patches, name  # counts are exact
    assert not alone.patches and with_patches.patches


def test_patches_are_counted_whether_or_not_norms_are_measured(with_patches: StepResult):
    plain = step_of(family="spacebyte", diagnose=False)
    assert plain.patches == with_patches.patches
    assert not plain.diagnosis


def test_bf16_passes_measure_nearly_what_fp32_does(alone: StepResult):
    bf16 = step_of(precision="bf16").diagnosis
    for name in ("gradient_noise/trace", "layer_gradient_norm/stack.blocks.0"):
        assert bf16[name] == pytest.approx(alone.diagnosis[name], rel=0.1), name


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.lists(st.integers(1, 1000), min_size=2, max_size=8))
def test_expected_norms_give_signal_and_trace(signal: float, trace: float, sizes: list[int]):
    """McCandlish et al. 2018, eq. A.2: E|g|^2 = |G|^2 + tr(S) / b."""
    squares = sum(signal + trace / size for size in sizes)
    norm = math.sqrt(signal + trace / sum(sizes))
    found = noise_numbers((squares, sum(1 / size for size in sizes), len(sizes)), norm, sum(sizes))
    assert found["gradient_noise/trace"] == pytest.approx(trace, rel=1e-3, abs=1e-6 * sum(sizes))
    assert found["gradient_noise/signal"] == pytest.approx(signal, rel=1e-3, abs=1e-6)


def test_one_micro_batch_has_no_noise():
    assert noise_numbers((4.0, 0.01, 1), 2.0, 100) == {}
