"""The kernels of mamba-ssm themselves against plain torch, in Triton's interpreter on a CPU.

The interpreter runs each program of a kernel in numpy, so values are checked, and places in memory. It does not compile
for a GPU, and does not multiply in TF32. docs/guides/successors/mamba.md has the commands that get the packages.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.kernels import mamba2 as fused
from pretrain.models import build_model, small_config
from pretrain.models.blocks import mamba2 as plain
from tests.pretrain.kernels import mamba2_packages
from tests.pretrain.kernels.test_mamba2 import passes

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1" or not all(map(find_spec, ("triton", "mamba_ssm"))),
        reason="needs triton and mamba_ssm, and TRITON_INTERPRET=1",
    ),
]
NAMES = ("y", "x", "steps", "rates", "write", "read", "skip")
"""Output of a scan, and the tensors whose gradients are compared."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.04}
"""Largest error, as a share of the largest number. The interpreter cuts bf16 off, where a GPU rounds it."""
LAYER = {"rows": 2, "length": 40, "heads": 2, "width": 8, "state": 4, "chunk": 16}
MOST_SETTINGS = 11
"""Most settings of block sizes that a kernel of mamba-ssm chooses from, by their speed on a GPU."""


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    """Import the modules of the scan without their package, whose import needs its CUDA library."""
    with pytest.MonkeyPatch.context() as patch:
        package = ModuleType("mamba_ssm")
        spec = find_spec("mamba_ssm")
        assert spec is not None
        package.__path__ = spec.submodule_search_locations  # type: ignore[assignment]
        patch.setitem(sys.modules, "mamba_ssm", package)
        patch.setitem(sys.modules, "causal_conv1d", None)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2))
        _multiply_bf16(patch)
        from mamba_ssm.ops.triton import (  # noqa: PLC0415 not installed by default
            ssd_bmm,
            ssd_chunk_scan,
            ssd_chunk_state,
            ssd_combined,
            ssd_state_passing,
        )

        for name, module in mamba2_packages.modules().items():
            if name.startswith("causal_conv1d"):
                patch.setitem(sys.modules, name, module)
        fused._convolutions.cache_clear()
        fused._scans.cache_clear()
        patch.setattr("pretrain.models.blocks.mamba2.takes_fused", lambda kernel, *_, **__: kernel == "fused")
        modules = [ssd_bmm, ssd_chunk_scan, ssd_chunk_state, ssd_combined, ssd_state_passing]
        patch.setattr(ssd_combined, "settings", _settings(modules), raising=False)
        choose(ssd_combined, MOST_SETTINGS - 1)
        yield ssd_combined
    fused._convolutions.cache_clear()
    fused._scans.cache_clear()


def _multiply_bf16(patch: pytest.MonkeyPatch) -> None:
    """Have the interpreter multiply bf16 in fp32; it multiplies its bits, as integers."""
    from triton import language as tl  # noqa: PLC0415 not installed by default
    from triton.runtime import interpreter  # noqa: PLC0415 likewise

    multiply = interpreter.InterpreterBuilder.create_dot

    def exact(factor: Any) -> Any:
        if factor.dtype.scalar != tl.bfloat16:
            return factor
        bits = factor.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, exact(a), exact(b), *rest)

    patch.setattr(interpreter.InterpreterBuilder, "create_dot", product)


def _settings(modules: list[ModuleType]) -> dict[Any, list[Any]]:
    """Return each kernel that chooses among settings, with all of these."""
    from triton.runtime.autotuner import Autotuner  # noqa: PLC0415 not installed by default

    found = {}
    for module in modules:
        for value in vars(module).values():
            kernel = value
            while kernel is not None and not isinstance(kernel, Autotuner):
                kernel = getattr(kernel, "fn", None)
            if kernel is not None:
                found[kernel] = list(kernel.configs)
    return found


def choose(kernels: Any, number: int) -> None:
    """Have each kernel take one of its settings; the interpreter cannot measure which is fastest."""
    for kernel, settings in kernels.settings.items():
        kernel.configs = [settings[number % len(settings)]]


def errors(dtype: torch.dtype, *, has_documents: bool, **sizes: int) -> dict[str, float]:
    """Return the errors of outputs and gradients of the fused scan, against plain torch in fp64.

    Args:
        dtype: type of x, write and read; the others are in fp32.
        has_documents: whether rows have several documents.
        **sizes: differences from LAYER.
    """
    at = SimpleNamespace(**LAYER | sizes)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    channels = at.heads * at.width
    mixed = draw(at.rows, at.length, channels + 2 * at.state).to(dtype)  # views with gaps, as in the layer
    x, write, read = mixed.split([channels, at.state, at.state], -1)
    steps, rates = F.softplus(draw(at.rows, at.length, at.heads) - 1), -draw(at.heads).exp()
    given = [x.unflatten(-1, (at.heads, at.width)), steps, rates, write, read, draw(at.heads)]
    documents = (torch.rand(at.rows, at.length, generator=generator) < 0.1).cumsum(1) if has_documents else None
    above = draw(at.rows, at.length, at.heads, at.width).to(dtype)

    def own(*tensors: Tensor) -> Tensor:
        return fused.scan(*tensors, chunk=at.chunk, documents=documents)

    def exact(*tensors: Tensor) -> Tensor:
        *scanned, skip = tensors
        return plain.scan(*scanned, chunk=at.chunk, documents=documents)[0] + skip[:, None] * tensors[0]

    ours = _results(own, given, above)
    theirs = _results(exact, [tensor.double() for tensor in given], above.double())
    assert [result.dtype for result in ours] == [dtype, *(tensor.dtype for tensor in given)]
    return {name: error(a, b) for name, a, b in zip(NAMES, ours, theirs, strict=True)}


def _results(function: Callable[..., Tensor], given: list[Tensor], above: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, above)]


def error(value: Tensor, exact: Tensor) -> float:
    """Return the largest difference as a share of the largest exact number."""
    return ((value.double() - exact.double()).abs().max() / exact.double().abs().max()).item()


SIZES = {
    "several chunks, the last one short": {},
    "whole chunks": {"length": 32},
    "one short chunk": {"length": 7},
    "one position": {"length": 1},
    "chunk that is no power of two": {"chunk": 12},
    "head and state that are no powers of two": {"width": 24, "state": 20, "heads": 1},
    "large head and state": {"rows": 1, "width": 80, "state": 144, "heads": 2},
    "long chunk": {"rows": 1, "heads": 1, "length": 150, "chunk": 128},
}


@pytest.mark.parametrize(
    ("dtype", "has_documents"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_scan_of_mamba_ssm_has_the_outputs_and_gradients_of_plain_torch(
    kernels: Any,
    sizes: dict[str, int],
    has_documents: bool,
    dtype: torch.dtype,
    record_property: Callable[[str, object], None],
):
    found = errors(dtype, has_documents=has_documents, **sizes)
    for name, value in found.items():
        record_property(name, value)
    assert max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.parametrize("number", range(MOST_SETTINGS))
def test_each_setting_of_block_sizes_gives_the_same(
    kernels: Any, number: int, record_property: Callable[[str, object], None]
):
    choose(kernels, number)
    try:
        found = errors(torch.float32, has_documents=True, rows=1, heads=1, length=140, chunk=128)
    finally:
        choose(kernels, MOST_SETTINGS - 1)
    for name, value in found.items():
        record_property(name, value)
    assert max(found.values()) <= TOLERANCE[torch.float32], found


@pytest.mark.parametrize(("crosses", "compiles"), [(True, False), (False, True)])
def test_model_with_the_scan_of_mamba_ssm_has_the_nats_and_gradients_of_plain_torch(
    kernels: Any, crosses: bool, compiles: bool, record_property: Callable[[str, object], None]
):
    torch.manual_seed(0)
    models = [
        build_model(small_config("mamba", kernel=kernel, attention_across_documents=crosses, dropout=0.0))
        for kernel in ("plain", "fused")
    ]
    models[1].load_state_dict(models[0].state_dict())
    if compiles:
        for unit in models[1].units():
            unit.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    expected, own = map(passes, models)
    found = [error(a, b) for a, b in zip(own, expected, strict=True)]
    record_property("nats", found[0])
    record_property("gradients", max(found[1:]))
    assert max(found) <= TOLERANCE[torch.float32]


def test_states_of_plain_torch_are_those_of_mamba_ssm(kernels: Any, record_property: Callable[[str, object], None]):
    generator = torch.Generator().manual_seed(2)
    x, write, read, before = (
        torch.randn(*shape, generator=generator) for shape in ((2, 21, 3, 8), (2, 21, 4), (2, 21, 4), (2, 3, 8, 4))
    )
    raw, bias = torch.randn(2, 21, 3, generator=generator), torch.randn(3, generator=generator)
    rates, gate = -torch.randn(3, generator=generator).exp(), torch.randn(2, 21, 3, 8, generator=generator)
    y, last = kernels.mamba_chunk_scan_combined(
        *(x, raw, rates, write[:, :, None], read[:, :, None], 8),
        **{"z": gate, "dt_bias": bias, "dt_softplus": True, "initial_states": before, "return_final_states": True},
    )
    own, states = plain.scan(x, F.softplus(raw + bias), rates, write, read, chunk=8, before=before.flatten(1, 2))
    found = {"y": error(own * F.silu(gate), y), "state": error(states[-1].view_as(last), last)}
    for name, value in found.items():
        record_property(name, value)
    assert max(found.values()) <= TOLERANCE[torch.float32], found
