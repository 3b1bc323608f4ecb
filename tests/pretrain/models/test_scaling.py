"""Maximal update parametrization: coordinate checks, and the identity at the widths of the base."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pretrain.conformance.subject import Subject
from pretrain.models import ByteModel, build_model
from pretrain.models.scaling import ScalingError
from pretrain.optim import OptimizerConfig, build_optimizers
from pretrain.optim.groups import parameter_rules, set_rate
from pretrain.optim.scaling import scale_model

FAMILIES = (
    "blt",
    "encoder",
    "encoder_decoder",
    "hnet",
    "mamba",
    "megabyte",
    "perceiver_ar",
    "spacebyte",
    "transformer",
    "transformer_xl",
)
MULTIPLES = (1, 2, 4)
"""Widths, in widths of the base."""
STEPS, RATE = 4, 2.0**-7
LARGEST_GROWTH = {"blt": 5.0}
"""Growth that is allowed, if not 1.5. BLT's vectors of patches begin near 0, and norms enlarge their changes."""


def stack(width: int, heads: int = 2) -> dict[str, int]:
    return {"width": width, "layers": 2, "heads": heads}


def widths(family: str, multiple: int) -> dict[str, Any]:
    """Return the fields of a model of a multiple of the base's widths, whose heads have the width of the base's."""
    wide, heads = 32 * multiple, 2 * multiple
    if family == "mamba":
        return {"width": wide}
    if family == "blt":
        local = {"width": wide, "heads": heads, "encoder_layers": 1, "decoder_layers": 2}
        return {"global_model": stack(4 * wide, 2 * heads), "local_model": local}
    if family == "hnet":  # a router would choose other positions after each step
        patches = {"patcher": {"name": "fixed", "size": 3}, "patches": 20}
        stage = {"width": wide, "heads": heads, "encoder": "m1t1", "decoder": "m1", "window": 8, **patches}
        inner = stage | {"encoder": "t1", "join": "multi_linear", "places": 2, "patches": 9}
        return {"stages": [stage, inner], "main": {"width": 2 * wide, "heads": 2 * heads, "layers": "T1"}}
    if family in ("megabyte", "spacebyte"):
        return {"global_model": stack(2 * wide, heads), "local_model": stack(wide, heads)}
    if family == "perceiver_ar":
        return {"latent_model": stack(wide, heads), "cross_heads": heads}
    return {"width": wide, "heads": heads}


def scaled_model(family: str, multiple: int, scaling: str, name: str = "adamw") -> tuple[ByteModel, OptimizerConfig]:
    """Return a model with first values, and the optimizer's config."""
    subject = Subject.of(family, **widths(family, multiple))
    base = widths(family, 1) if scaling == "mup" else {}
    optimizer = OptimizerConfig.model_validate({"name": name, "scaling": scaling, "base": base, "weight_decay": 0.0})
    with torch.device("meta"):
        model = scale_model(build_model(subject.config), subject.config, optimizer)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.initialize()
    return model.eval(), optimizer


def coordinates(family: str, multiple: int, scaling: str, name: str) -> dict[str, float]:
    """Return the size of the change of each block's output and of the logits over some steps.

    The steps repeat one random batch. The size is the root of the mean square.
    """
    model, optimizer = scaled_model(family, multiple, scaling, name)
    arguments = Subject.of(family, **widths(family, multiple)).arguments(4)
    seen: dict[str, Tensor] = {}
    for number, unit in enumerate(model.units()):
        unit.register_forward_hook(lambda _, __, out, number=number: seen.update({f"block {number}": out.detach()}))
    nats = model.nats

    def watched(states: Tensor, ids: Tensor) -> Tensor:
        seen["logits"] = model.logits(states).detach()
        return nats(states, ids)

    model.nats = watched  # type: ignore[method-assign]
    optimizers, first = build_optimizers(optimizer, model), dict[str, Tensor]()
    for step in range(STEPS + 1):
        model.zero_grad()
        loss = model(*arguments).mean()
        first = first or dict(seen)
        if step < STEPS:
            loss.backward()
            for each in optimizers:
                set_rate(each, RATE)
                each.step()
    return {place: (seen[place] - value).square().mean().sqrt().item() for place, value in first.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [*((family, "adamw") for family in FAMILIES), ("mamba", "muon")])
def test_sizes_of_changes_do_not_grow_with_width_and_grow_without_scaling(family: str, name: str):
    """Coordinate check (Yang et al. 2022, appendix D.1): without scaling, updates of Adam grow as the width does."""
    own, *wider = (coordinates(family, multiple, "mup", name) for multiple in MULTIPLES)
    assert own == coordinates(family, 1, "standard", name)  # they begin alike
    for multiple, sizes in zip(MULTIPLES[1:], wider, strict=True):
        for place, size in sizes.items():
            assert 0.4 < size / own[place] < LARGEST_GROWTH.get(family, 1.5), (multiple, place)
    standard = coordinates(family, MULTIPLES[-1], "standard", name)
    assert max(size / own[place] for place, size in standard.items()) > 2 * LARGEST_GROWTH.get(family, 1.0)
    assert standard["logits"] > 1.25 * own["logits"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_the_widths_of_the_base_is_the_base(family: str):
    (model, optimizer), (plain, standard) = (scaled_model(family, 1, scaling) for scaling in ("mup", "standard"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert parameter_rules(optimizer, model) == parameter_rules(standard, plain)


def deviation(model: ByteModel, name: str) -> float:
    return model.get_parameter(name).square().mean().sqrt().item()


def test_first_values_and_rates_follow_the_table():
    """Yang et al. 2022, table 8, at four times the width of the base."""
    models = {}
    for family in ("transformer", "spacebyte"):
        (model, optimizer), (plain, _) = (scaled_model(family, 4, scaling) for scaling in ("mup", "standard"))
        models[family] = model, plain, parameter_rules(optimizer, model)
    model, plain, rules = models["transformer"]
    for name, size, rate in [
        ("embedding.weight", 1, 1),
        ("start", 1, 1),
        ("stack.blocks.0.attention.query_key_value.weight", 1 / 2, 1 / 4),
        ("stack.blocks.1.feed_forward.contract.weight", 1 / 2, 1 / 4),
        ("stack.blocks.1.feed_forward_norm.weight", 1, 1),
        ("stack.norm.weight", 1 / 4, 1 / 4),  # before a tied head
    ]:
        assert deviation(model, name) == pytest.approx(size * deviation(plain, name), rel=1e-5), name
        assert rules[name].rate_multiplier == rate, name
    assert rules["stack.norm.bias"].rate_multiplier == 1 / 4
    model, plain, rules = models["spacebyte"]
    assert deviation(model, "head") == pytest.approx(deviation(plain, "head") / 4, rel=1e-5)
    assert rules["head"].rate_multiplier == 1 / 4
    assert rules["norm.weight"].rate_multiplier == 1


def test_a_step_takes_the_share_of_a_weight_that_the_base_model_takes():
    for name in ("adamw", "muon"):
        model, optimizer = scaled_model("transformer", 4, "mup", name)
        optimizer = optimizer.model_copy(update={"weight_decay": 0.1})
        groups = [group for each in build_optimizers(optimizer, model) for group in each.param_groups]
        shares = {round(group["rate_multiplier"] * group["weight_decay"], 12) for group in groups}
        assert shares == {0.0, 0.1}


def test_scaled_embeddings_and_post_norm_have_the_sizes_of_the_base():
    """A table whose rows are multiplied by the root of the width has the sizes of one that is not."""
    subject = Subject.of("transformer_xl", **widths("transformer_xl", 4), scale_embeddings=True, norm="post")
    optimizer = OptimizerConfig(scaling="mup", base=widths("transformer_xl", 1))
    with torch.device("meta"):
        model = scale_model(build_model(subject.config), subject.config, optimizer)
    rates = {name: rule.rate_multiplier for name, rule in parameter_rules(optimizer, model).items()}
    assert (rates["embedding.weight"], rates["blocks.1.feed_forward_norm.weight"]) == (1 / 2, 1 / 2)
    assert (rates["blocks.0.feed_forward_norm.weight"], rates["blocks.1.attention_norm.weight"]) == (1, 1)


def test_muon_scales_each_matrix_of_a_fused_parameter():
    """B and C of Mamba-2 have fewer outputs than inputs, so their rates fall as 1 / inputs."""
    subject = Subject.of("mamba", width=64, state=24)
    optimizer = OptimizerConfig(name="muon", scaling="mup", base={"width": 32})
    with torch.device("meta"):
        model = scale_model(build_model(subject.config), subject.config, optimizer)
    assert parameter_rules(optimizer, model)["blocks.0.mixer.select.weight"].rate_multiplier == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("family", "changes", "base", "text"),
    [
        ("transformer", {}, {"width": 16}, "heads of .* have 16 channels, and 8 in the base model"),
        ("transformer", {}, {"width": 16, "heads": 1, "layers": 1}, "differs in stack.blocks.1.* widths alone"),
        ("transformer", {}, {"width": 15}, r"optimizer.base.*heads \(2\) does not divide width \(15\)"),
        ("transformer", {}, {"wdith": 16}, "optimizer.base.wdith is not a field of the section model"),
        ("mamba", {"state": 8}, {"width": 8, "state": 4}, "has 8 numbers a channel, and 4 in the base model"),
        ("transformer", {"multi_byte": {"heads": 2}}, {"width": 16, "heads": 1}, "no rates for the heads of"),
        ("transformer_xl", {"final_norm": False}, {"width": 16, "heads": 1}, "TransformerXL has none; set optimizer"),
        ("perceiver_io", {}, {"input_width": 8}, "PerceiverIO has none; set optimizer.scaling to standard"),
    ],
)
def test_model_that_is_no_wider_base_is_refused(family: str, changes: Any, base: Any, text: str):
    subject = Subject.of(family, **changes)
    optimizer = OptimizerConfig(scaling="mup", base=base)
    with torch.device("meta"), pytest.raises(ScalingError, match=text):
        scale_model(build_model(subject.config), subject.config, optimizer)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"scaling": "mup"}, "needs optimizer.base"),
        ({"base": {"width": 16}}, "optimizer.base is the base model of optimizer.scaling mup"),
        ({"scaling": "mup", "base": {"width": 16}, "name": "adam", "weight_decay": 0.1}, "weight_decay 0"),
    ],
)
def test_scaling_without_base_and_base_without_scaling_are_refused(fields: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=text):
        OptimizerConfig(**fields)
