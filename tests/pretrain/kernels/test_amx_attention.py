"""Attention of the AMX kernel, compared with its definition in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.stream.loader import MicroBatch
from pretrain.engines import EngineConfig, build_engine
from pretrain.kernels import amx_attention
from pretrain.models import build_model, model_config
from pretrain.models.blocks.attention import CausalMask, attention
from pretrain.optim import OptimizerConfig
from tests.pretrain.models.rows import rows_of

pytestmark = pytest.mark.skipif(
    not amx_attention.is_available(), reason="the kernel needs a CPU with AMX and a C++ compiler"
)
ROUNDING = 2**-7
"""Relative tolerance of a norm: twice the spacing of bf16 at 1, because weights and results are both rounded."""


def draw(rows: int, heads: int, length: int, channels: int) -> Tensor:
    """Return random heads with the memory layout of linear layers."""
    return torch.randn(rows, length, heads, channels).bfloat16().transpose(1, 2)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, kept: Tensor | float = 1.0) -> Tensor:
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    visible = CausalMask(first).booleans(q.shape[2], k.shape[2])
    return (scores.masked_fill(~visible, -math.inf).softmax(-1) * kept) @ v


def assert_rounded(actual: list[Tensor], exact: list[Tensor]) -> None:
    for a, b in zip(actual, exact, strict=True):
        assert a.dtype == torch.bfloat16
        # Cancelling large terms leave an error as large as their rounding; inputs and slopes are of size 1.
        assert (a.double() - b).norm() <= ROUNDING * max(b.norm(), b.numel() ** 0.5 / 2)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.integers(1, 300),
    before=st.lists(st.integers(0, 300), min_size=3, max_size=3),
    after=st.integers(0, 200),
    channels=st.sampled_from([32, 64, 96, 128]),
)
def test_kernel_equals_attention_for_any_number_of_queries_and_keys(
    rows: int, heads: int, queries: int, before: list[int], after: int, channels: int
):
    torch.manual_seed(queries)
    first = torch.tensor(before[:rows])
    keys = int(first.max()) + queries + after
    inputs = [draw(rows, heads, length, channels).requires_grad_() for length in (queries, keys, keys)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = amx_attention.causal_attention(*inputs, first, 0.0)
    grad_out = torch.randn(out.shape).bfloat16()
    actual = [out, *torch.autograd.grad(out, inputs, grad_out)]
    reference = exact_attention(*exact, first)
    assert_rounded(actual, [reference, *torch.autograd.grad(reference, exact, grad_out.double())])


def test_future_positions_do_not_change_a_bit():
    torch.manual_seed(0)
    q, k, v = (draw(2, 2, 400, 64) for _ in range(3))
    first = torch.zeros(2, dtype=torch.long)
    before = amx_attention.causal_attention(q, k, v, first, 0.0)
    for place in (1, 127, 128, 399):
        changed = [x.clone() for x in (k, v)]
        for x in changed:
            x[:, :, place:] = torch.randn_like(x[:, :, place:])
        after = amx_attention.causal_attention(q, *changed, first, 0.0)
        assert torch.equal(after[:, :, :place], before[:, :, :place])


def test_backward_drops_the_same_weights_as_forward():
    share, length = 0.3, 128
    torch.manual_seed(0)
    q, k = (draw(2, 3, length, length).requires_grad_() for _ in range(2))
    v = torch.eye(length).bfloat16().expand(2, 3, length, length).clone().requires_grad_()
    first = torch.tensor([0, 50])
    out = amx_attention.causal_attention(q, k, v, first, share)  # the identity as values makes the output the weights
    visible = CausalMask(first).booleans(length, length).expand(out.shape)
    kept = (out.detach() > 0).double()
    assert kept[visible].mean().item() == pytest.approx(1 - share, abs=0.01)
    assert not torch.equal(kept[0, 0], kept[0, 1])
    grad_out = draw(2, 3, length, length)
    actual = [out, *torch.autograd.grad(out, (q, k, v), grad_out)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference = exact_attention(*exact, first, kept / (1 - share))
    assert_rounded(actual, [reference, *torch.autograd.grad(reference, exact, grad_out.double())])


def test_dropped_weights_depend_only_on_the_seed_of_torch():
    q, k, v = (draw(1, 2, 200, 32) for _ in range(3))
    first = torch.zeros(1, dtype=torch.long)

    def dropped(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return amx_attention.causal_attention(q, k, v, first, 0.5)

    assert torch.equal(dropped(1), dropped(1))
    assert not torch.equal(dropped(1), dropped(2))


@pytest.mark.parametrize("which", range(3))
def test_non_finite_inputs_reach_all_positions_that_see_them(which: int):
    torch.manual_seed(0)
    inputs = [draw(1, 2, 200, 32) for _ in range(3)]
    inputs[which][0, 0, 150, 3] = math.nan
    inputs = [x.requires_grad_() for x in inputs]
    out = amx_attention.causal_attention(*inputs, torch.zeros(1, dtype=torch.long), 0.0)
    visible = slice(150, 151) if which == 0 else slice(150, None)
    assert out[0, 0, visible].isnan().any(-1).all()
    assert out[0, 1].isfinite().all()
    assert any(gradient.isnan().any() for gradient in torch.autograd.grad(out.sum(), inputs))


def test_models_use_the_kernel_and_their_gradients_equal_those_of_torch(monkeypatch: pytest.MonkeyPatch):
    sizes = {"latents": 128, "latent_model": {"width": 64, "layers": 2, "heads": 2}, "cross_heads": 2}
    config = model_config(
        {"family": "perceiver_ar", "sequence_length": 512, "dropout": 0.0, "zero_head": False} | sizes
    )
    model = build_model(config).bfloat16()
    ids = torch.randint(0, 256, (2, 512))

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        return list(torch.autograd.grad(model.train()(ids).sum(), list(model.parameters())))

    calls = []
    kernel = amx_attention.causal_attention
    monkeypatch.setattr(amx_attention, "causal_attention", lambda *inputs: calls.append(inputs) or kernel(*inputs))
    ours = gradients()
    assert len(calls) == 3
    monkeypatch.setattr(amx_attention, "takes", lambda q, k: False)
    for a, b in zip(ours, gradients(), strict=True):
        assert (a - b).double().norm() <= 0.05 * b.double().norm() + 1e-3


def test_flop_counter_of_torch_counts_the_products_of_the_kernel():
    q, k, v = (draw(2, 3, length, 32).requires_grad_() for length in (140, 300, 300))
    with FlopCounterMode(display=False) as counter:
        out = amx_attention.causal_attention(q, k, v, torch.tensor([0, 160]), 0.0)
        one = 2 * 2 * 3 * 140 * 300 * 32
        assert counter.get_total_flops() == 2 * one
        out.sum().backward()
    assert counter.get_total_flops() == (2 + 5) * one


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_operations_pass_the_checks_of_torch_library(dropout: float):
    q, k, v = (draw(1, 2, 130, 32).requires_grad_() for _ in range(3))
    first, seed = torch.zeros(1, dtype=torch.long), torch.tensor(3)
    torch.library.opcheck(
        amx_attention._forward,
        (q, k, v, first, dropout, seed),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def losses_of(**options: object) -> list[float]:
    stack = {"width": 64, "layers": 2, "heads": 2}
    sizes = {"patch_size": 2, "global_model": stack, "local_model": stack | {"layers": 1}}
    torch.manual_seed(0)
    model = build_model(model_config({"family": "megabyte", "sequence_length": 512, "dropout": 0.1} | sizes))
    engine = build_engine(
        EngineConfig.model_validate({"precision": "bf16"} | options), model, OptimizerConfig(), seed=0
    )
    ids = np.random.default_rng(0).integers(0, 256, (2, 512))
    batch = [MicroBatch(0, rows_of(ids), np.ones(ids.shape, bool))]
    return [engine.train_step(batch, step=step, learning_rate=1e-3).nats for step in range(3)]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_drops_the_same_weights_bit_for_bit(mode: str):
    assert losses_of(activation_checkpointing=mode) == losses_of()


def test_compiled_block_uses_the_kernel():
    assert losses_of(compile=True) == pytest.approx(losses_of(), rel=2e-3)


def test_without_a_compiler_the_kernel_of_torch_is_used_and_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    amx_attention._library.cache_clear()
    try:
        q, k, v = (draw(1, 2, 200, 32) for _ in range(3))
        first = torch.tensor([0])
        out = attention(q, k, v, CausalMask(first))
        assert "did not compile" in caplog.text
        assert not list(tmp_path.rglob("*.so"))
        assert_rounded([out], [exact_attention(q.double(), k.double(), v.double(), first)])
    finally:
        monkeypatch.undo()
        amx_attention._library.cache_clear()
