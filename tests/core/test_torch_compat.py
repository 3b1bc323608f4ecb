"""Private interfaces of torch: each works with this version, and only torch_compat uses them."""

import re
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.distributed as dist

from byteloom.core import torch_compat
from pretrain.distributed.world import ALONE

ROOT = Path(__file__).parents[2]
PRIVATE = re.compile(r"(?:\btorch|\baten|\bdist|\bVariable)(?:\.\w+)*\._[a-z]|from torch\S* import .*\b_[a-z]")


def test_private_interfaces_of_torch_are_used_in_one_place():
    files = [path for package in ("byteloom", "pretrain", "benchmarks") for path in (ROOT / package).rglob("*.py")]
    users = {path.name for path in files if PRIVATE.search(path.read_text(encoding="utf-8"))}
    assert users == {"torch_compat.py"}


def test_limit_of_device_waits_is_not_for_groups_of_gloo():
    ALONE.ensure_group("cpu")
    try:
        torch_compat.limit_device_waits(timedelta(minutes=1))
        gloo: Any = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        assert gloo.options._timeout > timedelta(minutes=1)
    finally:
        ALONE.leave()


def test_collectives_equal_those_under_the_names_of_torch_2_11():
    ALONE.ensure_group("cpu")
    try:
        pairs = [
            (torch_compat.all_gather_single, dist.all_gather_into_tensor),
            (torch_compat.reduce_scatter_single, dist.reduce_scatter_tensor),
        ]
        for current, earlier in pairs:
            results = torch.zeros(2, 3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                for collective, result in zip((current, earlier), results, strict=True):
                    collective(result, torch.tensor([1.0, 2.0, 3.0]))
            assert results.tolist() == [[1, 2, 3]] * 2
    finally:
        ALONE.leave()


def test_cpu_capabilities_agree_with_those_torch_uses():
    capabilities = torch_compat.cpu_capabilities()
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert capabilities["avx2"]


def test_torch_without_capabilities_function_has_no_capabilities(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not torch_compat.cpu_capabilities()


def test_activation_budget_sets_the_budget_of_the_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch._functorch.config, "activation_memory_budget", 1.0)
    torch_compat.set_activation_memory_budget(0.25)
    assert torch._functorch.config.activation_memory_budget == 0.25


def test_callback_after_backward_sees_all_gradients():
    x, gradients = torch.ones(2, requires_grad=True), []
    loss = (x * x).sum()
    loss.register_hook(lambda _: torch_compat.call_after_backward(lambda: gradients.append(x.grad.tolist())))
    loss.backward()
    assert gradients == [[2.0, 2.0]]


def test_compiled_as_constant_sets_the_mark_of_torch_compiler():
    ours = torch_compat.compiled_as_constant(lambda: True)
    expected = torch.compiler.assume_constant_result(lambda: True)
    assert vars(ours) == vars(expected)


def test_attention_operations_have_the_expected_arguments():
    q = torch.ones(1, 1, 2, 8)
    output, normalizer = torch_compat.flash_attention(q, q, q, 0.0)
    assert output.shape == q.shape
    assert normalizer.numel() == 2
    assert len(torch_compat.ATTENTION) == 4
    for operation in torch_compat.ATTENTION:
        assert torch_compat.argument_names(operation)[:3] == ["query", "key", "value"]
        assert "dropout_p" in torch_compat.argument_names(operation)
