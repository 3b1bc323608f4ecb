"""Interfaces of torch that are private, or that not every supported version has. Nothing else uses any.

torch 2.11 to 2.13 are supported. tests/core/test_torch_compat.py fails first where a version renames one of these.

    interface of torch                                      public since    here
    distributed.all_gather_single, reduce_scatter_single    2.13            all_gather_single, reduce_scatter_single
        before: all_gather_into_tensor, reduce_scatter_tensor; 2.13 warns of these names
    cpu.get_capabilities                                    2.11            cpu_capabilities
        merged two weeks before 2.11 was cut, and not tried there
    _functorch.config.activation_memory_budget              private         set_activation_memory_budget
    autograd.Variable._execution_engine.queue_callback      private         call_after_backward
    the mark of torch.compiler.assume_constant_result       private         compiled_as_constant
    ops.aten._scaled_dot_product_*_attention                private         ATTENTION, flash_attention
    _schema of an operation                                 private         argument_names
    cuda.memory._record_memory_history, _dump_snapshot      private         record_memory, save_memory
    utils._python_dispatch, utils._pytree                   private         TorchDispatchMode, tree_leaves
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd import Variable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "ATTENTION",
    "TorchDispatchMode",
    "all_gather_single",
    "argument_names",
    "call_after_backward",
    "compiled_as_constant",
    "cpu_capabilities",
    "flash_attention",
    "record_memory",
    "reduce_scatter_single",
    "save_memory",
    "set_activation_memory_budget",
    "tree_leaves",
]

Function = TypeVar("Function", bound=Callable[..., Any])

_aten = torch.ops.aten
ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""Operations of fused attention, as a dispatcher sees them."""
flash_attention: Callable[..., Any] = _aten._scaled_dot_product_flash_attention_for_cpu
"""Fused attention of (q, k, v, dropout); returns the output and the logarithm of each query's normalizer."""

all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gather the tensors of all ranks into one."""
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Sum the tensors of all ranks, and give each rank its part."""


def cpu_capabilities() -> Mapping[str, Any]:
    """Return what instructions this CPU has, by name, such as avx512_bf16; nothing where torch does not tell."""
    tell: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return tell()


def argument_names(operation: Any) -> list[str]:
    """Return the names of the arguments of an operation, as a dispatcher sees it."""
    return [argument.name for argument in operation._schema.arguments]


def set_activation_memory_budget(share: float) -> None:
    """Set the share of activations that blocks which are compiled later keep for backward, 0 to 1."""
    import torch._functorch.config  # noqa: PLC0415 - for compiled blocks only

    torch._functorch.config.activation_memory_budget = share


def call_after_backward(callback: Callable[[], None]) -> None:
    """Have the autograd engine call a function when the backward pass that is under way has computed all gradients."""
    Variable._execution_engine.queue_callback(callback)


def compiled_as_constant(function: Function) -> Function:
    """Have torch.compile take what a function returns for a constant.

    torch.compiler.assume_constant_result does the same, and imports the compiler: two seconds of every command.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def record_memory(*, on: bool) -> None:
    """Begin or end the recording of CUDA's allocations, with their stacks."""
    torch.cuda.memory._record_memory_history(enabled="all" if on else None)


def save_memory(path: str) -> None:
    """Write the recorded allocations to a file."""
    torch.cuda.memory._dump_snapshot(path)
