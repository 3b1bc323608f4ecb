"""The loss in chunks is the loss at once, and the parts of layers with a backward of their own have the right one."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.models.blocks.feed_forward import FeedForward
from pretrain.models.blocks.nats import CHUNK, linear_nats
from pretrain.models.blocks.positions import Rotary, rotate

WIDTH, TOP = 24, 258


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_nats_and_their_gradients_are_those_of_all_logits_at_once(count: int, with_bias: bool):
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


def test_nats_of_bf16_states_are_fp32_and_their_weights_gradient_is_rounded_once():
    """The sum of many small parts in bf16 would stand still."""
    count = 32 * CHUNK
    x, ids = torch.ones(count, 1, dtype=torch.bfloat16), torch.zeros(count, dtype=torch.long)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    nats = linear_nats(x, ids, weight)
    assert nats.dtype == torch.float32
    nats.sum().backward()
    assert weight.grad.flatten().tolist() == [-count / 2, count / 2]


@pytest.mark.parametrize("places", [torch.arange(5), torch.arange(10).view(2, 5)])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_the_gradient_of_rotation_is_its_numerical_derivative(places: torch.Tensor, fraction: float):
    x = torch.randn(2, 3, 5, 8, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, places, Rotary(fraction)), x)


@pytest.mark.parametrize("activation", ["relu", "squared_relu", "gelu", "swiglu"])
def test_the_gradient_of_feed_forward_layers_is_their_numerical_derivative(activation: str):
    torch.manual_seed(0)
    layer = FeedForward(4, activation).double()
    assert torch.autograd.gradcheck(layer, torch.randn(3, 4, dtype=torch.double, requires_grad=True))
