"""Learning rates, and what decays."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from pretrain.models import ByteModel, build_model, model_config
from pretrain.models.blocks.unit import Unit
from pretrain.optim import (
    OPTIMIZERS,
    OptimizerConfig,
    ScheduleConfig,
    build_optimizers,
    learning_rate_at,
    schedule_mismatch,
)

STEPS, WARMUP = 100, 10
RATE = 1e-2
STACK = {"width": 16, "layers": 1, "heads": 2}


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


@given(
    shape=st.sampled_from(["polynomial", "cosine", "constant", "wsd"]),
    steps=st.integers(1, 400),
    warmup=st.integers(0, 400),
    final=st.floats(0, 1),
    power=st.floats(0.1, 4),
    decay=st.floats(0.01, 1),
)
def test_the_rate_never_falls_faster_than_its_decay(
    shape: Any, steps: int, warmup: int, final: float, power: float, decay: float
):
    """The decay alone: wsd falls by 1/(decay * steps) a step, others as fast as they do without a warm-up."""
    schedule = ScheduleConfig(shape=shape, warmup_steps=warmup, final_fraction=final, power=power, decay_fraction=decay)
    assume(schedule_mismatch(schedule, steps) is None)
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule)
    rates = [learning_rate_at(config, step, steps) for step in range(steps)]
    after = steps - warmup
    unwarmed = config.model_copy(update={"schedule": schedule.model_copy(update={"warmup_steps": 0})})
    alone = [learning_rate_at(unwarmed, step, after) for step in range(after + 1)]
    steepest = (1 - final) / (decay * steps) if shape == "wsd" else max(a - b for a, b in pairwise(alone))
    assert all(a - b <= steepest + 1e-9 for a, b in pairwise(rates))
    assert max(rates) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("schedule", "steps", "field"),
    [
        ({"warmup_steps": 100}, 100, "warmup_steps"),
        ({"warmup_steps": 101}, 100, "warmup_steps"),
        ({"warmup_steps": 99}, 100, None),
        ({"warmup_steps": 0}, 1, None),
        ({"shape": "wsd", "warmup_steps": 40, "decay_fraction": 0.6}, 100, None),
        ({"shape": "wsd", "warmup_steps": 42, "decay_fraction": 0.6}, 100, "decay_fraction"),
        ({"shape": "wsd", "warmup_steps": 60, "decay_fraction": 1.0}, 100, "decay_fraction"),
        ({"shape": "wsd", "warmup_steps": 0, "decay_fraction": 1.0}, 100, None),
        ({"shape": "cosine", "warmup_steps": 60, "decay_fraction": 1.0}, 100, None),
    ],
)
def test_warm_up_ends_before_the_run_and_before_decay(schedule: dict[str, Any], steps: int, field: str | None):
    found = schedule_mismatch(ScheduleConfig(**schedule), steps)
    assert (found and found.fields[0]) == (field and f"optimizer.schedule.{field}")


FAMILIES: dict[str, dict[str, Any]] = {
    "megabyte": {
        "patch_size": 4,
        "global_model": STACK,
        "local_model": STACK | {"width": 8},
        "patch_encoder": "convolution",
    },
    "perceiver_ar": {"latents": 8, "latent_model": STACK, "cross_heads": 2, "positions": "learned"},
    "transformer": STACK | {"positions": "learned"},
    "transformer_xl": STACK | {"memory_length": 8},
}
TABLES = {
    "megabyte": {"global_embedding.weight", "local_embedding.weight", "global_positions", "local_positions"},
    "perceiver_ar": {"embedding.weight", "position_tables.0"},
    "transformer": {"embedding.weight", "positions"},
    "transformer_xl": {"embedding.weight"},
}
families = pytest.mark.parametrize("family", FAMILIES)
names = pytest.mark.parametrize("name", OPTIMIZERS.names())


def model_of(family: str) -> ByteModel:
    torch.manual_seed(0)
    return build_model(model_config({"family": family, "sequence_length": 16, "dropout": 0.0} | FAMILIES[family]))


def decays_of(model: ByteModel, **config: Any) -> dict[str, float]:
    """The decay of each parameter, all of which are in one group of one optimizer."""
    groups = [group for it in build_optimizers(OptimizerConfig(**config), model) for group in it.param_groups]
    decays = [(id(parameter), group["weight_decay"]) for group in groups for parameter in group["params"]]
    assert len(decays) == len(dict(decays)) == len(list(model.parameters()))
    return {name: dict(decays)[id(parameter)] for name, parameter in model.named_parameters()}


@names
@families
def test_norms_biases_and_pads_do_not_decay_and_tables_by_option(family: str, name: str):
    model = model_of(family)
    decays = decays_of(model, name=name, weight_decay=0.3)
    still = {parameter for parameter, decay in decays.items() if decay == 0.0}
    assert {decays[parameter] for parameter in decays.keys() - still} == {0.3}
    assert still == {
        parameter
        for parameter in decays
        if "norm" in parameter or parameter.endswith(("bias", "pad")) or parameter == "start"
    }
    without = decays_of(model, name=name, weight_decay=0.3, decay_embeddings=False)
    assert {parameter for parameter, decay in without.items() if decay == 0.0} == still | TABLES[family]


@families
def test_adam_decays_nothing_unless_told_to(family: str):
    assert set(decays_of(model_of(family), name="adam").values()) == {0.0}
    assert set(decays_of(model_of(family), name="adamw").values()) == {0.0, 0.1}


@families
def test_muon_has_the_matrices_within_blocks(family: str):
    model = model_of(family)
    muon, adamw = build_optimizers(OptimizerConfig(name="muon"), model)
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    of_muon = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = "blocks" in name and name.endswith("weight") and "norm" not in name
        assert (id(parameter) in of_muon) == is_matrix, name


class OneBlock(nn.Module):
    """A matrix within a block, and its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Unit()
        self.block.linear = nn.Linear(5, 3)

    outside_units = ByteModel.outside_units

    def units(self) -> list[Unit]:
        return [self.block]


def torchs_own(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Of a model of one matrix within a block, made by torch alone."""
    matrices, rest = ([p for p in model.parameters() if (p.dim() == 2) == is_matrix] for is_matrix in (True, False))
    adam: dict[str, Any] = {"lr": RATE, "betas": (0.9, 0.98), "fused": True}
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    if name == "adam":
        return [torch.optim.Adam(groups, weight_decay=0.1, **adam)]
    if name == "adamw":
        return [torch.optim.AdamW(groups, weight_decay=0.1, **adam)]
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.0, **adam),
    ]


@names
def test_moments_in_place_before_the_first_step_change_nothing(name: str):
    """The state is laid out by us, so that a checkpoint can be read into it; the steps are torch's own."""
    ours, theirs = OneBlock(), OneBlock()
    theirs.load_state_dict(ours.state_dict())
    mine = build_optimizers(OptimizerConfig(name=name, learning_rate=RATE, weight_decay=0.1), ours)
    reference = torchs_own(name, theirs)
    for step in range(4):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizers in ((ours, mine), (theirs, reference)):
            model.zero_grad()
            model.block.linear(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_muon_steps_along_the_nearest_orthogonal_matrix_at_the_size_of_adamws_steps():
    """Jordan 2024; scaled by 0.2 · sqrt(max(rows, columns)) as Liu et al. 2025, 0.2 being AdamW's usual step."""
    model = OneBlock()
    (weight,) = (p for p in model.parameters() if p.dim() == 2)
    muon, _ = build_optimizers(OptimizerConfig(name="muon", learning_rate=RATE, weight_decay=0.0), model)
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    muon.step()
    step = (before - weight.detach()) / (RATE * 0.2 * max(weight.shape) ** 0.5)
    u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
    torch.testing.assert_close(torch.linalg.svdvals(step), torch.ones(3), rtol=0, atol=0.35)  # of five iterations
    assert F.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.97
