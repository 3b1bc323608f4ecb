"""Gradients in bf16 lose nothing in sums over positions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.blocks.embedding import embedding
from pretrain.models.blocks.norms import LayerNorm, RMSNorm

POSITIONS, WIDTH = 8192, 16
LARGEST_ERROR = 0.01
"""Relative. Rounding to bf16 is at most 2^-9 of each value, and largely averages out in a sum."""


def table() -> nn.Module:
    module = embedding(258, WIDTH)
    nn.init.zeros_(module.weight)
    return module


@pytest.mark.parametrize(
    "make", [lambda: LayerNorm(WIDTH), lambda: RMSNorm(WIDTH), table], ids=["layer", "rms", "table"]
)
def test_gradients_in_bf16_are_those_of_fp64(make: Callable[[], nn.Module]):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, POSITIONS // 2, WIDTH, generator=generator)
    upstream = (torch.randn(x.shape, generator=generator) + 1) * 1e-4  # a mean, over which small sums stall
    ids = torch.randint(8, x.shape[:2], generator=generator)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        module = make().to(dtype)
        read = ids if isinstance(module, nn.Embedding) else x.bfloat16().to(dtype).requires_grad_()
        module(read).backward(upstream.bfloat16().to(dtype))
        found = [parameter.grad for parameter in module.parameters()]
        return found if isinstance(module, nn.Embedding) else [*found, read.grad]

    for own, exact in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert own.dtype == torch.bfloat16
        assert (own.double() - exact).norm() <= LARGEST_ERROR * exact.norm()
