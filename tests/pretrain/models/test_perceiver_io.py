"""Perceiver IO: cost by length, shared weights, and the sizes of the paper."""

import re

import pytest
import torch
from pydantic import ValidationError

from data_pipeline.vocabulary import PADDING
from pretrain.estimate.activations import measure_activations, on_meta
from pretrain.models import build_model, model_config, small_config
from pretrain.models.families.perceiver_io import PerceiverIO, PerceiverIOConfig

BYTES = {
    "family": "perceiver_io",
    "sequence_length": 2048,
    "special_ids": 4,
    "latent_model": {"width": 1280, "layers": 26, "heads": 8},
}


def perceiver_io(**changes: object) -> PerceiverIO:
    """Return a small model in float64 whose every parameter matters."""
    model = build_model(small_config("perceiver_io", **changes)).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    assert isinstance(model, PerceiverIO)
    return model


def test_model_of_the_papers_symbols_has_the_parameters_of_the_published_one():
    """The published model has 262 symbols, all in the softmax: 201,108,230 parameters."""
    model = on_meta(model_config(BYTES))
    unused_biases = 262 - len(model.head_weights()[0])
    assert model.parameter_count() + unused_biases == 201_108_230


def test_cost_is_linear_in_the_length_and_latents_do_not_see_it():
    model = on_meta(small_config("perceiver_io", sequence_length=64))
    costs = [model.flops(length) for length in (16, 32, 48)]
    assert costs[2] - costs[1] == costs[1] - costs[0]


@torch.no_grad()
def test_repeats_run_the_same_blocks_again():
    once, twice = perceiver_io(repeats=1), perceiver_io(repeats=2)
    assert once.state_dict().keys() == twice.state_dict().keys()
    doubled = perceiver_io(repeats=1, latent_model={"width": 32, "layers": 4, "heads": 2})
    weights = {
        f"latent_blocks.{layer}{name.removeprefix(f'latent_blocks.{layer % 2}')}": value
        for layer in range(4)
        for name, value in twice.state_dict().items()
        if name.startswith(f"latent_blocks.{layer % 2}.")
    }
    doubled.load_state_dict(twice.state_dict() | weights)
    given = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(twice.encode(given), doubled.encode(given))
    assert not torch.allclose(twice.encode(given), once.encode(given))


@torch.no_grad()
def test_perceiver_shares_all_cross_attends_but_the_first():
    """Perceiver, arXiv:2103.03206: with one set of weights for both, the model is the one with equal blocks."""
    perceiver = perceiver_io(cross_attend_every_repeat=True, repeats=4)
    assert len(perceiver.input_blocks) == 2
    given = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    inputs, visible = perceiver.read(perceiver.read.embed(given)), torch.ones(2, 1, 1, 32, dtype=torch.bool)
    z = perceiver.latents.repeat(2, 1, 1)
    for repeat in range(4):
        z = perceiver.input_blocks[0 if repeat == 0 else 1](z, inputs, visible)
        for block in perceiver.latent_blocks:
            z = block(z)
    torch.testing.assert_close(perceiver.encode_latents(given), z)


@torch.no_grad()
def test_latents_are_a_function_of_the_set_of_inputs_with_positions():
    """Attention has no order of its own: inputs that change places with their positions give the same latents."""
    model = perceiver_io()
    given = torch.randint(256, (1, 32), generator=torch.Generator().manual_seed(1))
    before, order = model.encode_latents(given), torch.randperm(32, generator=torch.Generator().manual_seed(2))
    assert model.read.learned is not None
    model.read.learned.copy_(model.read.learned[order])
    torch.testing.assert_close(model.encode_latents(given[:, order]), before)
    assert torch.equal(model.encode_latents(torch.full((1, 5), PADDING)).isfinite().all(), torch.tensor(True))


def test_activations_are_measured_with_values_wider_than_queries():
    few, many = (measure_activations(small_config("perceiver_io"), rows, torch.bfloat16) for rows in (1, 2))
    assert 0 < few.kept < many.kept < 2 * few.kept + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_key_width": 9}, "cross_heads (2) does not divide query_key_width (9)"),
        ({"latent_model": {"width": 30, "layers": 1, "heads": 3}}, "latent_model.heads (3) does not divide"),
        ({"input_width": 9}, "cross_heads (2) does not divide input_width (9)"),
        ({"repeats": 1, "cross_attend_every_repeat": True}, "cross_attend_every_repeat needs repeats of 2 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=re.escape(message)):
        PerceiverIOConfig.model_validate(small_config("perceiver_io").model_dump() | changes)
