"""Every form of the rotation computes the same, and rounds once."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pretrain.kernels.rotary import _turn_in_cache, _turn_in_one_loop, turned
from pretrain.models.blocks.positions import Rotary, rotate

UNIT_ROUNDOFF = 2**-8
"""Largest relative error of a number that is rounded to bf16."""


def problem(channels: int, dtype: torch.dtype, *, by_row: bool, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return heads of 16 channels as a linear map makes them, and the angles' cosines and sines."""
    torch.manual_seed(0)
    x = torch.randn(rows, 7, 3, 4, 16).to(dtype).permute(2, 0, 3, 1, 4)[0]
    angles = torch.rand(rows, 1, 7, channels // 2) * 100 if by_row else torch.rand(7, channels // 2) * 100
    precise = torch.promote_types(dtype, torch.float32)
    return x, angles.cos().to(precise), angles.sin().to(precise)


shapes = pytest.mark.parametrize(("channels", "by_row"), [(16, False), (16, True), (6, False), (6, True), (0, False)])


@shapes
@pytest.mark.parametrize("form", [turned, _turn_in_cache])
def test_turned_bf16_numbers_are_rounded_once(form, channels: int, by_row: bool):
    x, cos, sin = problem(channels, torch.bfloat16, by_row=by_row)
    exact, got = turned(x.double(), cos.double(), sin.double()), form(x, cos, sin)
    assert got.dtype == torch.bfloat16
    assert got.is_contiguous()
    assert ((got.double() - exact).abs() <= UNIT_ROUNDOFF * exact.abs() + 1e-6).all()


def rounding_of_bf16() -> float:
    """Return the deviation of the rounding error of a standard normal number that is rounded to bf16.

    From 2^e to 2^(e + 1), the error is uniform within 2^e / 256, so its variance is 4^e / (3 x 256^2).
    """
    below = [math.erf(2.0**e / math.sqrt(2)) for e in range(-30, 6)]  # share of numbers below 2^e
    squares = sum(4.0**e * (above - own) for e, (own, above) in enumerate(pairwise(below), -30))
    return UNIT_ROUNDOFF * math.sqrt(squares / 3)


def test_scores_of_one_distance_deviate_by_the_rounding_of_queries_and_keys_alone():
    """A score of unit variance is a sum of d products over the root of d, and both factors are rounded.

    No rotation whose results are bf16 can do better.
    """
    torch.manual_seed(0)
    heads, channels, distance, places = 64, 64, 5, torch.arange(1000, 1064)
    q, k = (torch.randn(1, heads, 1, channels).bfloat16() for _ in range(2))
    exact = q.double(), k.double()

    def scores(q: Tensor, k: Tensor) -> Tensor:
        """Return the score of each pair of positions at the distance, by head."""
        x, y = (z.expand(-1, -1, len(places), -1).contiguous() for z in (q, k))
        turned_q, turned_k = rotate(x, places, Rotary()), rotate(y, places - distance, Rotary())
        return (turned_q.double() * turned_k.double()).sum(-1) / math.sqrt(channels)

    deviation = (scores(q, k) - scores(*exact)).square().mean().sqrt().item()
    assert deviation == pytest.approx(math.sqrt(2) * rounding_of_bf16(), rel=0.1)
    assert scores(*exact).std(-1).max() < 1e-10  # the distance alone matters


@shapes
def test_rows_turned_in_parts_equal_all_at_once(channels: int, by_row: bool, monkeypatch: pytest.MonkeyPatch):
    x, cos, sin = problem(channels, torch.double, by_row=by_row, rows=5)
    monkeypatch.setattr("pretrain.kernels.rotary.CACHED_NUMBERS", 2 * x[0].numel())
    torch.testing.assert_close(_turn_in_cache(x, cos, sin), turned(x, cos, sin), atol=1e-14, rtol=0)


@pytest.mark.slow
def test_compiled_rotation_equals_the_plain_one():
    x, cos, sin = problem(6, torch.bfloat16, by_row=True)
    got = _turn_in_one_loop(x, cos, sin)
    assert got.is_contiguous()
    torch.testing.assert_close(got, turned(x, cos, sin), atol=1e-6, rtol=2 * UNIT_ROUNDOFF)
