"""Fused kernels of Mamba-2: refusals, calls of the packages, compilation. benchmarks/gpu.py runs the packages.

`mamba2_packages` takes their place here. `test_mamba2_interpreted` runs mamba-ssm itself.
"""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.vocabulary import SEPARATOR
from pretrain.kernels import mamba2 as fused
from pretrain.kernels.mamba2 import KernelError, largest_tensor, unfit
from pretrain.models import ByteModel, build_model, small_config
from tests.pretrain.kernels import mamba2_packages

TOLERANCE = {torch.float64: 1e-12, torch.bfloat16: 0.1}
"""Largest error of nats and gradients, as a share of the largest number. In bf16, each operation rounds by 0.004."""


def build(**changes: object) -> ByteModel:
    torch.manual_seed(0)
    model = build_model(small_config("mamba", **changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def ids_in_documents() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (2, 32), generator=generator)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.15, SEPARATOR)


def test_training_with_fused_kernels_is_refused_on_a_cpu_and_evaluation_is_plain():
    ids, plain = ids_in_documents(), build().eval()
    with pytest.raises(
        KernelError, match=r"model\.kernel: fused: it needs CUDA, and the device is cpu; set it to auto"
    ):
        build(kernel="fused")(ids)
    with torch.no_grad():
        assert torch.equal(build(kernel="fused").eval()(ids), plain(ids))
    assert torch.equal(build(kernel="auto").eval()(ids), plain(ids))


@pytest.fixture
def cleared_checks() -> Iterator[None]:
    """Forget which packages are installed, before a test and after it."""
    fused._missing_package.cache_clear()
    yield
    fused._missing_package.cache_clear()


@pytest.mark.usefixtures("cleared_checks")
@pytest.mark.skipif(find_spec("causal_conv1d") is not None, reason="the package is installed")
def test_missing_package_is_named_with_who_needs_it():
    expected = "model.kernel: fused needs causal-conv1d: pip install 'causal-conv1d' (No module named 'causal_conv1d')"
    assert fused.missing_package() == expected


@pytest.mark.usefixtures("cleared_checks")
def test_package_that_is_too_old_is_named_with_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "causal_conv1d-1.5.4.post2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: causal-conv1d\nVersion: 1.5.4.post2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert fused.missing_package() == (
        "model.kernel: fused needs causal-conv1d 1.6.0 or newer, and 1.5.4.post2 is installed: "
        "pip install --no-build-isolation 'causal-conv1d>=1.6.0'"
    )


@pytest.mark.parametrize(
    ("dtype", "channels", "largest", "reason"),
    [
        (torch.float32, 8, 2**31 - 1, None),
        (torch.float64, 8, 1, "it does not compute in float64"),
        (torch.bfloat16, 12, 1, "the convolution has 12 channels, no multiple of 8"),
        (
            torch.bfloat16,
            8,
            2**31,
            "one of its tensors would have 2,147,483,648 numbers, and the most is 2,147,483,647",
        ),
    ],
)
def test_layer_that_the_kernels_cannot_compute_is_named(
    dtype: torch.dtype, channels: int, largest: int, reason: str | None
):
    assert unfit(torch.device("cuda"), dtype, channels, largest) == reason


def test_largest_tensor_is_the_states_in_short_chunks_and_the_products_in_long_ones():
    layer = {"heads": 8, "width": 64, "state": 128}
    assert largest_tensor(3, 1024, **layer, chunk=64) == 3 * 1024 // 64 * 8 * 64 * 128
    assert largest_tensor(3, 4096, heads=64, width=16, state=16, chunk=4096) == 3 * 64 * 4096 * 4096 // 32
    assert largest_tensor(3, 1000, heads=1, width=8, state=4, chunk=300) == 3 * 1200 * 300


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put modules with the demands of the packages in the place of the packages."""
    for name, module in mamba2_packages.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    caches = (fused._convolutions, fused._scans)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr("pretrain.models.blocks.mamba2.takes_fused", lambda kernel, *_, **__: kernel == "fused")
    yield
    for cached in caches:
        cached.cache_clear()


def passes(model: ByteModel) -> list[Tensor]:
    """Return the nats of rows of several documents, and the gradients of all parameters."""
    nats = model(ids_in_documents())
    return [nats.detach(), *torch.autograd.grad(nats.sum(), list(model.parameters()))]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("crosses", [True, False])
def test_calls_obey_the_packages_and_give_the_plain_results(crosses: bool, dtype: torch.dtype):
    plain, own = (
        passes(build(kernel=kernel, attention_across_documents=crosses, dropout=0.0).to(dtype))
        for kernel in ("plain", "fused")
    )
    for fused_values, values in zip(own, plain, strict=True):
        error = (fused_values.double() - values.double()).abs().max() / values.double().abs().max()
        assert error <= TOLERANCE[dtype]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("keeps", "scans"), [("all", 2), ("products", 2), ("input", 4)])
def test_scan_is_recomputed_only_where_a_block_keeps_its_input_alone(
    keeps: str, scans: int, monkeypatch: pytest.MonkeyPatch
):
    model = build(kernel="fused", dropout=0.0)
    expected = passes(model)
    forward, backward = fused._scans()
    calls = []
    monkeypatch.setattr(fused, "_scans", lambda: (lambda *a, **k: calls.append(1) or forward(*a, **k), backward))
    for unit in model.units():
        unit.keeps = keeps  # type: ignore[assignment]
    for own, value in zip(passes(model), expected, strict=True):
        torch.testing.assert_close(own, value, rtol=0, atol=0)
    assert len(calls) == scans


@pytest.mark.slow
@pytest.mark.usefixtures("packages")
def test_compiled_block_is_one_graph_with_the_same_results():
    model = build(kernel="fused", attention_across_documents=False, dropout=0.0)
    expected = passes(model)
    for unit in model.units():
        unit.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    for own, value in zip(passes(model), expected, strict=True):
        torch.testing.assert_close(own, value, rtol=1e-10, atol=1e-12)
