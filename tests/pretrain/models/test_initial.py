"""First values: any range is drawn alone, from a normal distribution truncated at two deviations."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.engines import EngineConfig, build_engine
from pretrain.models import build_model, small_config
from pretrain.models.initial import CACHED_VALUES, WHOLE_DRAWING, Initial, _quantiles, draw
from pretrain.optim import OptimizerConfig

NORMAL = NormalDist()
KEPT = NORMAL.cdf(2) - NORMAL.cdf(-2)
LENGTH = 2 * CACHED_VALUES + 13
WHOLE = draw(Initial(0.02, 1.0), 7, "a.weight", 0, LENGTH)


@given(st.integers(0, LENGTH), st.integers(0, LENGTH))
@settings(max_examples=50, deadline=None)
def test_any_range_equals_the_same_part_of_the_whole_parameter(one: int, other: int):
    begin, end = sorted((one, other))
    assert torch.equal(draw(Initial(0.02, 1.0), 7, "a.weight", begin, end), WHOLE[begin:end])


def test_values_are_the_same_on_every_machine():
    # The stream of Philox that NumPy guarantees, and sums, products and quotients of fp32, which IEEE 754 fixes.
    values = draw(Initial(1.0), 1, "a", (1 << 40) - 3, (1 << 40) + 3)
    assert [value.hex() for value in values.tolist()] == [
        "-0x1.3b94d40000000p-1",
        "0x1.6ada680000000p-1",
        "0x1.a5dce60000000p-1",
        "-0x1.0bcc5e0000000p-5",
        "-0x1.2e56f40000000p-1",
        "-0x1.52fc720000000p-2",
    ]


def test_quantiles_equal_those_of_the_truncated_normal_distribution():
    places = np.linspace(-1, 1, 4001)[1:-1]
    values = np.empty(len(places), np.float32)
    _quantiles(places.astype(np.float32), values)
    exact = [NORMAL.inv_cdf(0.5 + KEPT / 2 * float(np.float32(place))) for place in places]
    np.testing.assert_allclose(values, exact, rtol=1e-6, atol=1e-12)
    assert np.abs(values).max() <= 2


def test_values_have_the_declared_distribution():
    n = 1 << 20
    values = draw(Initial(0.5, 3.0), 3, "b", 0, n).double().sub(3).div(0.5)
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    variance = 1 - 4 * density / KEPT  # of a normal distribution truncated at two deviations
    fourth = 3 * variance - 2 * 8 * density / KEPT
    assert values.mean().item() == pytest.approx(0, abs=5 * math.sqrt(variance / n))
    assert values.var().item() == pytest.approx(variance, abs=5 * math.sqrt((fourth - variance**2) / n))
    assert values.pow(4).mean().item() == pytest.approx(fourth, abs=0.02)
    assert values.abs().max() <= 2
    ranks = (np.array([NORMAL.cdf(v) for v in values[: 1 << 15].sort().values.tolist()]) - NORMAL.cdf(-2)) / KEPT
    distance = np.abs(ranks - (np.arange(1 << 15) + 0.5) / (1 << 15)).max()
    assert distance < 1.95 / math.sqrt(1 << 15)  # Kolmogorov-Smirnov, level 0.001


def test_values_of_different_seeds_names_and_places_are_uncorrelated():
    n = 1 << 16
    one = draw(Initial(1.0), 1, "a", 0, n)
    others = [draw(Initial(1.0), 2, "a", 0, n), draw(Initial(1.0), 1, "b", 0, n), one.roll(1), one.roll(8)]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 5 / math.sqrt(n)


def test_constants_are_exact():
    assert draw(Initial(mean=1.0), 0, "norm.weight", 5, 8).tolist() == [1.0] * 3


def test_version_1_draws_the_same_values_as_before():
    with torch.device("meta"):
        model = build_model(small_config("transformer"))
    values = model.first_values("embedding.weight", (4, 3), 5, version=WHOLE_DRAWING)
    generator = torch.Generator().manual_seed(8962412270099328963)
    std = model.initial("embedding.weight").std
    expected = torch.nn.init.trunc_normal_(torch.empty(4, 3), 0.0, std, -2 * std, 2 * std, generator=generator)
    assert torch.equal(values, expected.view(-1))
    assert torch.equal(model.first_values("embedding.weight", (4, 3), 5, begin=2, end=7, version=1), values[2:7])


@pytest.mark.parametrize("version", [1, 2])
def test_engine_begins_with_the_version_of_its_run(version: int):
    with torch.device("meta"):
        model = build_model(small_config("megabyte"))
    engine = build_engine(EngineConfig(device="cpu", precision="fp32"), model, OptimizerConfig(), 3)
    engine.begin(version)
    for fragment in engine.fragments():
        kind, _, name = fragment.name.partition("/")
        if kind == "model":
            assert torch.equal(fragment.data, model.first_values(name, fragment.shape, 3, version=version)), name
