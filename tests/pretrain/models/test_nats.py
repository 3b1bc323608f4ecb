"""The loss in chunks equals the loss at once. Custom backward passes equal numerical derivatives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pretrain.models.blocks import nats
from pretrain.models.blocks.feed_forward import FeedForward
from pretrain.models.blocks.nats import CPU_CHUNK as CHUNK
from pretrain.models.blocks.nats import linear_nats
from pretrain.models.blocks.positions import Rotary, rotate, sinusoids

WIDTH, TOP = 24, 258


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("multiple", [1, nats.CUDA_COLUMNS])
def test_chunked_nats_and_their_gradients_equal_those_of_all_logits_at_once(
    count: int, with_bias: bool, multiple: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(nats, "columns_multiple", lambda device: multiple)
    torch.manual_seed(0)
    x = torch.randn(count, WIDTH, dtype=torch.double, requires_grad=True)
    weight = torch.randn(TOP, WIDTH, dtype=torch.double, requires_grad=True)
    bias = torch.randn(TOP, dtype=torch.double, requires_grad=True) if with_bias else None
    ids, prices = torch.randint(0, TOP, (count,)), torch.randn(count, dtype=torch.double)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    chunked = linear_nats(x, ids, weight, bias)
    at_once = F.cross_entropy(F.linear(x, weight, bias), ids, reduction="none")
    torch.testing.assert_close(chunked, at_once, atol=1e-12, rtol=0)
    expected = torch.autograd.grad(at_once, inputs, prices)
    for got, wanted in zip(torch.autograd.grad(chunked, inputs, prices), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


def test_z_loss_changes_the_gradient_alone_as_if_its_square_of_log_z_were_added():
    torch.manual_seed(0)
    x = torch.randn(40, WIDTH, dtype=torch.double, requires_grad=True)
    weight, bias = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((TOP, WIDTH), (TOP,)))
    ids, prices = torch.randint(0, TOP, (40,)), torch.randn(40, dtype=torch.double)
    nats = linear_nats(x, ids, weight, bias, z_loss=0.1)
    assert torch.equal(nats, linear_nats(x, ids, weight, bias))
    logits = F.linear(x, weight, bias)
    added = F.cross_entropy(logits, ids, reduction="none") + 0.1 * logits.logsumexp(1).square()
    expected = torch.autograd.grad(added, [x, weight, bias], prices)
    for got, wanted in zip(torch.autograd.grad(nats, [x, weight, bias], prices), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=0)


def test_nats_of_bf16_states_are_fp32_and_the_gradient_of_the_weights_is_rounded_once():
    """A sum of many small parts in bf16 would stop growing."""
    count = 32 * CHUNK
    x, ids = torch.ones(count, 1, dtype=torch.bfloat16), torch.zeros(count, dtype=torch.long)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    nats = linear_nats(x, ids, weight)
    assert nats.dtype == torch.float32
    nats.sum().backward()
    assert weight.grad.flatten().tolist() == [-count / 2, count / 2]


@pytest.mark.slow
@pytest.mark.parametrize("places", [torch.arange(5), torch.arange(10).view(2, 5)])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_gradient_of_rotation_equals_its_numerical_derivative(places: torch.Tensor, fraction: float):
    x = torch.randn(2, 3, 5, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, places, Rotary(fraction)), x)


@pytest.mark.parametrize("activation", ["relu", "squared_relu", "gelu", "gelu_tanh", "swiglu"])
def test_gradient_of_feed_forward_layers_equals_their_numerical_derivative(activation: str):
    torch.manual_seed(0)
    layer = FeedForward(4, activation).double()
    assert torch.autograd.gradcheck(layer, torch.randn(3, 4, dtype=torch.double, requires_grad=True))


@pytest.mark.parametrize("longest", [None, 10_000])
def test_sinusoids_of_far_positions_are_those_of_float64(longest: int | None):
    """The authors of Perceiver AR compute their table with NumPy in float64, and round it to fp32."""
    places, width = torch.tensor([0, 1, 131_070, 131_071]), 512
    count = np.arange(width // 2)
    turns = 10_000.0 ** (-count / (width // 2 if longest is None else width // 2 - 1))
    angles = places.numpy()[:, None] * turns
    expected = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    np.testing.assert_allclose(sinusoids(places, width, longest).numpy(), expected, atol=1e-7)
