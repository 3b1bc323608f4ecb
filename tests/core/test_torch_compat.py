"""Interfaces of torch that may change between versions: what each does, and that nothing else of ours uses any."""

import re
import warnings
from pathlib import Path

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


def test_collectives_do_the_same_under_the_names_of_torch_2_11():
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


def test_capabilities_agree_with_what_torch_uses():
    capabilities = torch_compat.cpu_capabilities()
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert capabilities["avx2"]


def test_a_torch_that_does_not_tell_its_capabilities_has_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not torch_compat.cpu_capabilities()


def test_the_budget_of_activations_is_that_of_the_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch._functorch.config, "activation_memory_budget", 1.0)
    torch_compat.set_activation_memory_budget(0.25)
    assert torch._functorch.config.activation_memory_budget == 0.25


def test_the_callback_comes_after_all_gradients():
    x, seen = torch.ones(2, requires_grad=True), []
    loss = (x * x).sum()
    loss.register_hook(lambda _: torch_compat.call_after_backward(lambda: seen.append(x.grad.tolist())))
    loss.backward()
    assert seen == [[2.0, 2.0]]


def test_the_mark_of_a_constant_is_the_compilers_own():
    ours = torch_compat.compiled_as_constant(lambda: True)
    theirs = torch.compiler.assume_constant_result(lambda: True)
    assert vars(ours) == vars(theirs)


def test_attention_is_known_by_its_operations_and_arguments():
    q = torch.ones(1, 1, 2, 8)
    output, normalizer = torch_compat.flash_attention(q, q, q, 0.0)
    assert output.shape == q.shape
    assert normalizer.numel() == 2
    assert len(torch_compat.ATTENTION) == 4
    for operation in torch_compat.ATTENTION:
        assert torch_compat.argument_names(operation)[:3] == ["query", "key", "value"]
        assert "dropout_p" in torch_compat.argument_names(operation)
