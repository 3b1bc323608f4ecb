"""Learning rates, and what decays."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from pretrain.optimizers import OptimizerConfig, ScheduleConfig, build_optimizer, learning_rate_at

STEPS, WARMUP = 100, 10


def rates(**schedule: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, schedule=ScheduleConfig(warmup_steps=WARMUP, **schedule))
    return [learning_rate_at(config, step, STEPS) for step in range(STEPS + 1)]


shapes = pytest.mark.parametrize("shape", ["polynomial", "cosine", "constant", "wsd"])


@shapes
def test_warm_up_is_linear_to_the_peak(shape: str):
    assert rates(shape=shape)[:WARMUP] == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP)])
    assert rates(shape=shape)[WARMUP] == 1.0


@shapes
@pytest.mark.parametrize("final", [0.0, 0.25])
def test_decay_is_monotone_and_ends_at_the_final_fraction(shape: str, final: float):
    after = rates(shape=shape, final_fraction=final)[WARMUP:]
    assert all(a >= b for a, b in pairwise(after))
    assert after[-1] == pytest.approx(1.0 if shape == "constant" else final)
    assert after[-2] > after[-1] or shape == "constant"


def test_shapes_are_what_their_names_say():
    half = WARMUP + (STEPS - WARMUP) // 2
    assert rates(shape="polynomial")[half] == pytest.approx(0.5)
    assert rates(shape="polynomial", power=2.0)[half] == pytest.approx(0.25)
    assert rates(shape="cosine")[half] == pytest.approx(0.5)
    third = WARMUP + (STEPS - WARMUP) // 3
    assert rates(shape="cosine")[third] == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    stable = rates(shape="wsd", decay_fraction=0.5)
    assert stable[STEPS // 2] == 1.0
    assert stable[STEPS // 2 + 10] == pytest.approx(0.8)


def test_only_matrices_and_tables_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), model.parameters())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.1, 0.0, 0.0, 0.0]


def test_moments_in_place_before_the_first_step_change_nothing():
    """AdamW's state is laid out by us, so that a checkpoint can be read into it; the steps are torch's own."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
    mine = build_optimizer(config, ours.parameters())
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step in range(4):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
