"""Every form of the rotation computes the same, and rounds once."""

import pytest
import torch
from torch import Tensor

from pretrain.kernels.rotary import _turn_in_cache, _turn_in_one_loop, turned

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
