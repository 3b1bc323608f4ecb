"""Learning-rate schedules, weight decay, and the optimizers' steps."""

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
from pretrain.models.blocks.feed_forward import FeedForward
from pretrain.models.blocks.multi_head import Attention, CrossAttention
from pretrain.models.blocks.unit import Unit
from pretrain.optim import (
    OPTIMIZERS,
    OptimizerConfig,
    OptimizerError,
    ScheduleConfig,
    build_optimizers,
    learning_rate_at,
    schedule_mismatch,
)
from pretrain.optim.groups import set_rate
from pretrain.optim.muon import Muon

STEPS, WARMUP = 100, 10
RATE = 1e-2
STACK = {"width": 16, "layers": 1, "heads": 2}


def rates(**schedule: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, schedule=ScheduleConfig(warmup_steps=WARMUP, **schedule))
    return [learning_rate_at(config, step, STEPS) for step in range(STEPS + 1)]


shapes = pytest.mark.parametrize("shape", ["polynomial", "cosine", "quarter_cosine", "constant", "wsd"])


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


def test_schedules_have_the_shapes_of_their_names():
    half = WARMUP + (STEPS - WARMUP) // 2
    assert rates(shape="polynomial")[half] == pytest.approx(0.5)
    assert rates(shape="polynomial", power=2.0)[half] == pytest.approx(0.25)
    assert rates(shape="cosine")[half] == pytest.approx(0.5)
    third = WARMUP + (STEPS - WARMUP) // 3
    assert rates(shape="cosine")[third] == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert rates(shape="quarter_cosine")[third] == pytest.approx(math.cos(math.pi / 6))
    stable = rates(shape="wsd", decay_fraction=0.5)
    assert stable[STEPS // 2] == 1.0
    assert stable[STEPS // 2 + 10] == pytest.approx(0.8)
    assert rates(shape="wsd", decay_steps=50) == stable


@pytest.mark.slow
@given(
    shape=st.sampled_from(["polynomial", "cosine", "quarter_cosine", "constant", "wsd"]),
    steps=st.integers(1, 400),
    warmup=st.integers(0, 400),
    final=st.floats(0, 1),
    power=st.floats(0.1, 4),
    decay=st.floats(0.01, 1),
)
def test_learning_rate_never_falls_faster_than_its_decay(
    shape: Any, steps: int, warmup: int, final: float, power: float, decay: float
):
    """Decay alone sets the limit: wsd falls by 1/(decay * steps) per step, others as fast as without a warm-up."""
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
        ({"shape": "wsd", "warmup_steps": 40, "decay_steps": 60}, 100, None),
        ({"shape": "wsd", "warmup_steps": 40, "decay_steps": 62}, 100, "decay_steps"),
        ({"shape": "wsd", "warmup_steps": 0, "decay_steps": 102}, 100, "decay_steps"),
        ({"shape": "wsd", "warmup_steps": 0, "decay_steps": 10, "decay_fraction": 0.2}, 100, "decay_steps"),
        ({"shape": "wsd", "warmup_steps": 0, "decay_fraction": None}, 100, "decay_steps"),
    ],
)
def test_warm_up_ends_before_the_run_and_before_decay(schedule: dict[str, Any], steps: int, field: str | None):
    found = schedule_mismatch(ScheduleConfig(**schedule), steps)
    assert (found and found.fields[0]) == (field and f"optimizer.schedule.{field}")


HNET_STAGE = {"width": 16, "heads": 2, "encoder": "m1", "decoder": "T1", "patcher": {"name": "learned", "size": 3}}
FAMILIES: dict[str, dict[str, Any]] = {
    "blt": {
        "patches": 6,
        "local_model": {"width": 8, "heads": 2, "encoder_layers": 1, "decoder_layers": 1},
        "global_model": STACK,
        "ngrams": {"sizes": (3,), "buckets": 20},
    },
    "hnet": {
        "stages": [
            HNET_STAGE | {"patches": 8},
            HNET_STAGE | {"patches": 4, "patcher": {"name": "fixed", "size": 2}, "join": "multi_linear", "places": 2},
        ],
        "main": {"width": 24, "heads": 2, "layers": "T1"},
        "mamba": {"head_width": 8, "state": 4},
    },
    "mamba": {"width": 16, "layers": 2, "head_width": 8, "state": 4},
    "megabyte": {
        "patch_size": 4,
        "global_model": STACK,
        "local_model": STACK | {"width": 8},
        "patch_encoder": "convolution",
    },
    "perceiver_ar": {"latents": 8, "latent_model": STACK, "cross_heads": 2, "positions": "learned"},
    "perceiver_io": {"latents": 8, "latent_model": STACK, "input_width": 8, "cross_heads": 2, "query_key_width": 4},
    "spacebyte": {"patches": 6, "local_model": STACK, "global_model": STACK},
    "transformer": STACK | {"positions": "learned"},
    "transformer_xl": STACK | {"memory_length": 8},
}
TABLES = {
    "blt": {"embedding.weight", "ngrams.tables.0.weight", "head"},
    "hnet": {"embedding.weight", "head"},
    "mamba": {"embedding.weight"},
    "megabyte": {"global_embedding.weight", "local_embedding.weight", "global_positions", "local_positions"},
    "perceiver_ar": {"embedding.weight", "position_tables.0"},
    "perceiver_io": {"read.table.weight", "read.learned", "latents", "queries"},
    "spacebyte": {"embedding.weight", "positions", "patch_positions", "head"},
    "transformer": {"embedding.weight", "positions"},
    "transformer_xl": {"embedding.weight"},
}
families = pytest.mark.parametrize("family", FAMILIES)
names = pytest.mark.parametrize("name", OPTIMIZERS.names())


def model_of(family: str) -> ByteModel:
    torch.manual_seed(0)
    return build_model(model_config({"family": family, "sequence_length": 16, "dropout": 0.0} | FAMILIES[family]))


def decays_of(model: ByteModel, **config: Any) -> dict[str, float]:
    """Return the decay of each parameter; check that each is in exactly one group of one optimizer."""
    groups = [
        group for optimizer in build_optimizers(OptimizerConfig(**config), model) for group in optimizer.param_groups
    ]
    decays = [(id(parameter), group["weight_decay"]) for group in groups for parameter in group["params"]]
    assert len(decays) == len(dict(decays)) == len(list(model.parameters()))
    return {name: dict(decays)[id(parameter)] for name, parameter in model.named_parameters()}


@names
@families
def test_norms_biases_and_the_like_do_not_decay_and_embeddings_decay_by_option(family: str, name: str):
    model = model_of(family)
    decays = decays_of(model, name=name, weight_decay=0.3)
    undecayed = {parameter for parameter, decay in decays.items() if decay == 0.0}
    assert {decays[parameter] for parameter in decays.keys() - undecayed} == {0.3}
    assert undecayed == {
        parameter
        for parameter in decays
        if "norm" in parameter or parameter.endswith(("bias", "pad", "log_rate", "skip")) or parameter == "start"
    }
    without = decays_of(model, name=name, weight_decay=0.3, decay_embeddings=False)
    assert {parameter for parameter, decay in without.items() if decay == 0.0} == undecayed | TABLES[family]


@families
def test_adam_has_no_weight_decay_by_default(family: str):
    assert set(decays_of(model_of(family), name="adam").values()) == {0.0}
    assert set(decays_of(model_of(family), name="adamw").values()) == {0.0, 0.1}


@families
def test_muon_updates_exactly_the_matrices_within_blocks(family: str):
    model = model_of(family)
    muon, adamw = build_optimizers(OptimizerConfig(name="muon"), model)
    assert (type(muon), type(adamw)) == (Muon, torch.optim.AdamW)
    muon_parameters = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        is_matrix = "block" in name and name.endswith("weight") and "norm" not in name and "convolution" not in name
        assert (id(parameter) in muon_parameters) == is_matrix, name


class OneBlock(nn.Module):
    """Model of one block with one layer; by default a matrix and its bias."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.block = Unit()
        self.block.linear = layer or nn.Linear(5, 3)

    outside_units = ByteModel.outside_units
    rate_multiplier = ByteModel.rate_multiplier
    may_decay = ByteModel.may_decay
    scales = ByteModel.scales
    trained_parameters = ByteModel.trained_parameters
    fused_matrices = ByteModel.fused_matrices

    def units(self) -> list[Unit]:
        return [self.block]


def torch_optimizers(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return optimizers made by torch alone for a model of one matrix within a block."""
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
def test_moments_allocated_before_the_first_step_change_nothing(name: str):
    """Byteloom allocates the state, so that a checkpoint can be read into it; the steps are torch's own."""
    own_model, torch_model = OneBlock(), OneBlock()
    torch_model.load_state_dict(own_model.state_dict())
    own_optimizers = build_optimizers(OptimizerConfig(name=name, learning_rate=RATE, weight_decay=0.1), own_model)
    reference = torch_optimizers(name, torch_model)
    for step in range(4):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizers in ((own_model, own_optimizers), (torch_model, reference)):
            model.zero_grad()
            model.block.linear(x).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(own_model.parameters(), torch_model.parameters(), strict=True))


def test_muon_steps_along_the_nearest_orthogonal_matrix_with_the_size_of_adamw_steps():
    """Jordan 2024, scaled by 0.2 · sqrt(max(rows, columns)) as in Liu et al. 2025, where 0.2 is AdamW's usual step."""
    model = OneBlock()
    (weight,) = (p for p in model.parameters() if p.dim() == 2)
    muon, _ = build_optimizers(OptimizerConfig(name="muon", learning_rate=RATE, weight_decay=0.0), model)
    before = weight.detach().clone()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    muon.step()
    step = (before - weight.detach()) / (RATE * 0.2 * max(weight.shape) ** 0.5)
    u, _, v = torch.linalg.svd(weight.grad, full_matrices=False)
    torch.testing.assert_close(torch.linalg.svdvals(step), torch.ones(3), rtol=0, atol=0.35)  # error of five iterations
    assert F.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.97


@pytest.mark.parametrize(
    ("layer", "matrices"),
    [
        (Attention(16, 2, 0.0, bias=True), {"query_key_value": 3, "output": 1}),
        (CrossAttention(8, 16, 2, None, bias=True), {"query": 1, "key_value": 2, "output": 1}),
        (FeedForward(16, "swiglu", bias=True), {"expand": 2, "contract": 1}),
        (FeedForward(16, "relu", bias=True), {"expand": 1, "contract": 1}),
    ],
)
def test_muon_updates_each_logical_matrix_as_if_it_were_a_parameter(layer: nn.Module, matrices: dict[str, int]):
    """The first of them has a hundredth of the gradient of the others, which its update does not depend on."""
    model = OneBlock(layer)
    config = OptimizerConfig(name="muon", learning_rate=RATE, weight_decay=0.1)
    muon, _ = build_optimizers(config, model)
    separate = {}
    for name, number in matrices.items():
        weight = layer.get_parameter(f"{name}.weight")
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        weight.grad[: len(weight) // number] /= 100
        separate[name] = [nn.Parameter(part.detach().clone()) for part in weight.chunk(number)]
        for part, gradient in zip(separate[name], weight.grad.chunk(number), strict=True):
            part.grad = gradient.clone()
    reference = torch.optim.Muon(
        [part for parts in separate.values() for part in parts], lr=RATE, adjust_lr_fn="match_rms_adamw"
    )
    for optimizer in (muon, reference):
        optimizer.step()
    for name, parts in separate.items():
        assert torch.equal(layer.get_parameter(f"{name}.weight"), torch.cat(parts)), name


@names
def test_rate_multiplier_multiplies_the_update_and_the_schedule_stays_the_base_rate(name: str):
    """Parameters begin at 0, so the first update has no rounding but that of a product with a power of 2."""
    models = [OneBlock(nn.Linear(8, 8)), OneBlock(nn.Linear(8, 8))]
    factors = {"block.linear.weight": 4.0, "block.linear.bias": 0.5}
    models[1].rate_multiplier = factors.get
    for model in models:
        optimizers = build_optimizers(OptimizerConfig(name=name), model)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            nn.init.zeros_(parameter)
        for optimizer in optimizers:
            set_rate(optimizer, 2.0**-7)
            optimizer.step()
    plain, multiplied = (dict(model.named_parameters()) for model in models)
    for parameter, factor in factors.items():
        assert torch.equal(multiplied[parameter], factor * plain[parameter]) and plain[parameter].any()


@names
def test_a_model_exempts_parameters_from_decay(name: str):
    model = model_of("transformer")
    model.may_decay = lambda parameter: "feed_forward" not in parameter
    plain = decays_of(model_of("transformer"), name=name, weight_decay=0.3)
    expected = {parameter: 0.0 if "feed_forward" in parameter else decay for parameter, decay in plain.items()}
    assert decays_of(model, name=name, weight_decay=0.3) == expected != plain


@pytest.mark.parametrize("multiplier", [0.0, -1.0, math.inf, math.nan])
def test_multiplier_that_is_no_positive_number_is_refused(multiplier: float):
    model = OneBlock()
    model.rate_multiplier = lambda _: multiplier
    with pytest.raises(OptimizerError, match=f"rate_multiplier is {multiplier} for block.linear.weight"):
        build_optimizers(OptimizerConfig(), model)


@names
@families
def test_entry_counts_the_numbers_of_its_moments(family: str, name: str):
    model = model_of(family)
    states = [state for each in build_optimizers(OptimizerConfig(name=name), model) for state in each.state.values()]
    held = sum(tensor.numel() for state in states for kind, tensor in state.items() if kind != "step")
    assert OPTIMIZERS.get(name).count_moments(model) == held
