"""Fused kernels of Mamba-2: where they are refused, and what they are called with. benchmarks/gpu.py runs them."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from byteloom.core.packages import MissingPackageError
from data_pipeline.vocabulary import SEPARATOR
from pretrain.kernels import mamba2 as fused
from pretrain.kernels.mamba2 import KernelError
from pretrain.models import ByteModel, build_model, small_config


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


@pytest.mark.skipif(find_spec("causal_conv1d") is not None, reason="the package is installed")
def test_missing_package_is_named_with_who_needs_it():
    with pytest.raises(MissingPackageError, match=r"model\.kernel: fused needs causal-conv1d: pip install"):
        fused.convolution(torch.zeros(1, 2, 8), torch.zeros(8, 4), torch.zeros(8), None)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None, activation: str) -> Tensor:
    """Compute what the docstring of causal-conv1d says: x (batch, dim, seqlen), seq_idx (batch, seqlen)."""
    assert activation == "silu"
    assert x.stride(1) == 1  # with seq_idx it takes channels last
    taps, total = weight.shape[1], bias[:, None].expand_as(x)
    for back in range(taps):
        part = F.pad(x, (back, 0))[..., : x.shape[2]] * weight[:, taps - 1 - back, None]
        if seq_idx is not None:
            assert seq_idx.dtype == torch.int32
            part = part * (F.pad(seq_idx, (back, 0), value=-1)[:, : x.shape[2]] == seq_idx)[:, None]
        total = total + part
    return F.silu(total)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor,
    seq_idx: Tensor | None,
) -> Tensor:
    """Compute what the docstring of mamba-ssm says, step by step: B and C are (batch, seqlen, groups, state)."""
    state, outputs = torch.zeros(*x.shape[:1], *x.shape[2:], B.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, 0, None, None]
        outputs.append((state * C[:, t, 0, None, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1)


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put functions that follow the packages' documentation in the place of the packages."""
    names = ("causal_conv1d", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined")
    for name in names:
        module = ModuleType(name)
        module.causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]
        module.mamba_chunk_scan_combined = mamba_chunk_scan_combined  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    fused._packages.cache_clear()
    monkeypatch.setattr("pretrain.models.blocks.mamba2.takes_fused", lambda kernel, *_, **__: kernel == "fused")
    yield
    fused._packages.cache_clear()


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize("crosses", [True, False])
def test_arguments_of_the_packages_give_the_plain_results_by_their_documentation(crosses: bool):
    ids, results = ids_in_documents(), []
    for kernel in ("plain", "fused"):
        model = build(kernel=kernel, attention_across_documents=crosses, dropout=0.0)
        nats = model(ids)
        results.append([nats, *torch.autograd.grad(nats.sum(), list(model.parameters()))])
    for own, plain in zip(*results, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-6)
