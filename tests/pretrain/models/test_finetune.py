"""Adapters and frozen parameters."""

from typing import Any

import pytest
import torch

from pretrain.models import ByteModel, all_families, small_config
from pretrain.models.adapters import adapted_layers, adapters_of, added, linear_layers
from pretrain.models.finetune import FinetuneConfig, FinetuneError, apply, build_finetuned
from pretrain.optim import OptimizerConfig, build_optimizers

EVERYWHERE = {"freeze": ["*"], "adapters": {"layers": ["*"], "rank": 2, "alpha": 6}}


def finetuned(family: str = "transformer", **section: Any) -> ByteModel:
    torch.manual_seed(0)
    return build_finetuned(small_config(family, dropout=0.0), FinetuneConfig.model_validate(section)).eval()


def nats_of(model: ByteModel) -> torch.Tensor:
    torch.manual_seed(1)
    ids, given = model.empty_example(3, torch.device("cpu"))
    ids = torch.randint(256, ids.shape)
    with torch.no_grad():
        return model(ids) if given is None else model(ids, torch.randint(256, given.shape))


def with_values_in_adapters(model: ByteModel) -> ByteModel:
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.adapter_up.weight, std=0.3)
    return model


@pytest.mark.parametrize("family", all_families())
def test_new_adapters_leave_every_score_as_it_was(family: str):
    plain, adapted = finetuned(family), finetuned(family, **EVERYWHERE)
    assert adapted_layers(adapted).keys() == linear_layers(plain).keys()
    adapted.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(nats_of(adapted), nats_of(plain))


@pytest.mark.parametrize("family", all_families())
def test_adapters_compute_what_the_weights_compute_that_they_are_added_to(family: str):
    adapted, merged = with_values_in_adapters(finetuned(family, **EVERYWHERE)), finetuned(family)
    weights = adapted.state_dict()
    for name, own in merged.named_parameters():
        own.data.copy_(weights[name])
        down, up = (weights.get(each) for each in adapters_of(name))
        if down is not None and up is not None:
            own.data += added(down, up, 3.0, 0, own.numel()).view_as(own)
    assert not torch.allclose(nats_of(adapted), nats_of(finetuned(family)), atol=1e-3)
    torch.testing.assert_close(nats_of(adapted), nats_of(merged), rtol=1e-4, atol=1e-4)


def test_any_range_of_a_weight_gets_the_same_addition():
    down, up = torch.randn(3, 7), torch.randn(5, 3)
    whole = added(down, up, 2.0, 0, 35)
    torch.testing.assert_close(whole.view(5, 7), 2.0 * (up @ down).double(), rtol=1e-5, atol=1e-5)
    for begin in range(35):
        for end in range(begin + 1, 36):
            assert torch.equal(added(down, up, 2.0, begin, end).float(), whole[begin:end].float())


def test_patterns_freeze_parameters_and_what_is_within_modules():
    model = finetuned(freeze=["stack.blocks.0", "embedding"], train=["*.bias"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    expected = {name for name, _ in model.named_parameters() if name.startswith(("stack.blocks.0.", "embedding."))}
    assert frozen == {name for name in expected if not name.endswith(".bias")} != set()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"freeze": ["embeding"]},
            "finetune.freeze has 'embeding', which matches no parameter of this model (",
        ),
        ({"freeze": ["*.atention"]}, "(did you mean *.attention?)"),
        ({"freeze": ["*"], "adapters": {"layers": ["stack.*.norm"]}}, "finetune.adapters.layers has 'stack.*.norm', "),
        (
            {"freeze": ["*"], "adapters": {"layers": ["*"], "rank": 100}},
            "rank is 100, and stack.blocks.0.",
        ),
        ({"freeze": ["*"]}, "finetune.freeze freezes every parameter"),
        ({"train": ["*"]}, "finetune.train has '*', which finetune.freeze does not freeze"),
    ],
)
def test_section_that_does_not_fit_the_model_is_refused_with_what_fits(section: dict[str, Any], message: str):
    with pytest.raises(FinetuneError) as caught:
        finetuned(**section)
    assert message in str(caught.value)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("section", [EVERYWHERE, {"freeze": ["*"], "train": ["embedding"]}])
def test_optimizers_update_trained_parameters_alone_and_count_their_moments(optimizer: str, section: dict[str, Any]):
    model, config = finetuned(**section), OptimizerConfig.model_validate({"name": optimizer})
    built = build_optimizers(config, model)
    held = {parameter: state for each in built for parameter, state in each.state.items()}
    assert {id(parameter) for parameter in held} == {id(each) for each in model.trained_parameters().values()}
    numbers = [tensor.numel() for state in held.values() for name, tensor in state.items() if name != "step"]
    assert config.entry.count_moments(model) == sum(numbers)


def test_adapters_of_fused_matrices_are_fused_too():
    model = finetuned(**EVERYWHERE)
    fused = model.fused_matrices()
    assert fused["stack.blocks.0.attention.query_key_value.adapter_up.weight"] == 3
    assert fused["stack.blocks.0.attention.query_key_value.adapter_down.weight"] == 1


def test_first_values_of_adapters_are_those_that_the_paper_says():
    model = finetuned(**EVERYWHERE)
    shape = (2, model.get_submodule("stack.blocks.0.attention.output").in_features)
    name = "stack.blocks.0.attention.output.adapter_{}.weight"
    assert not model.first_values(name.format("up"), shape[::-1], 5).any()
    values = model.first_values(name.format("down"), shape, 5)
    assert torch.equal(values, model.first_values(name.format("down"), shape, 5))
    assert 0 < values.std() < (1 / 3 / shape[1]) ** 0.5 * 1.5


def test_section_without_patterns_changes_nothing():
    model = finetuned()
    apply(FinetuneConfig(), model)
    assert len(model.trained_parameters()) == len(list(model.parameters()))
