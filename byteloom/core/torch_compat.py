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
        and those of their backward passes                  private         flash_attention_forward, _backward
    _schema of an operation                                 private         argument_names
    _C._accelerator_setAllocatorSettings                    private         set_allocator
    distributed_c10d._world.pg_map, _set_default_timeout    private         limit_device_waits
    cuda.memory._record_memory_history, _dump_snapshot      private         record_memory, save_memory
    autograd.profiler._is_profiler_enabled                  private         annotate
    FSDPModule._get_fsdp_state, and unsharded_param there   private         unsharded_parameters
    utils._python_dispatch, utils._pytree                   private         TorchDispatchMode, tree_leaves
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "ATTENTION",
    "TorchDispatchMode",
    "all_gather_single",
    "annotate",
    "argument_names",
    "call_after_backward",
    "compiled_as_constant",
    "cpu_capabilities",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_forward",
    "limit_device_waits",
    "record_memory",
    "reduce_scatter_single",
    "save_memory",
    "set_activation_memory_budget",
    "set_allocator",
    "tree_leaves",
    "unsharded_parameters",
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


def flash_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return fused attention, and the logarithm of each query's normalizer, (rows, heads, queries) in fp32 or fp64.

    Args:
        q: (rows, heads, queries, d)
        k: (rows, heads, keys, d)
        v: (rows, heads, keys, d)
        causal: query i sees the keys up to i.
        mask: (rows, 1, queries, keys) numbers that are added to the scores.
    """
    if q.device.type != "cuda":
        out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
    else:
        bias = _aligned(mask, q.shape[1])
        out, log_sum, *_ = _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal)
        log_sum = log_sum[:, :, : q.shape[2]]  # the kernel pads the queries
    return out, log_sum


def flash_attention_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    If `out` and `log_sum` are of more keys than `k`, the gradients are the share of these keys.
    """
    if q.device.type != "cuda":
        how = (gradient, q, k, v, out, log_sum, 0.0, causal)
        of_q, of_k, of_v = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*how, attn_mask=mask)
    else:
        log_sum = F.pad(log_sum, (0, -q.shape[2] % 32))
        nothing = torch.zeros((), dtype=torch.long, device=q.device)
        of_q, of_k, of_v, _ = _aten._scaled_dot_product_efficient_attention_backward(
            *(
                gradient,
                q,
                k,
                v,
                _aligned(mask, q.shape[1]),
                out,
                log_sum,
                nothing,
                nothing,
                0.0,
                [True, True, True, False],
                causal,
            )
        )
    return of_q, of_k, of_v


def _aligned(mask: Tensor | None, heads: int) -> Tensor | None:
    """Return a mask for all heads in the alignment that CUDA's kernel needs."""
    if mask is None:
        return None
    return F.pad(mask, (0, -mask.shape[3] % 16))[..., : mask.shape[3]].expand(-1, heads, -1, -1)


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


def set_allocator(settings: str) -> None:
    """Set options of the device allocator, as the environment variable PYTORCH_ALLOC_CONF does."""
    torch._C._accelerator_setAllocatorSettings(settings)


def limit_device_waits(limit: timedelta) -> None:
    """Set how long later collectives of NCCL may take, in all process groups."""
    cuda = torch.device("cuda")
    for group in list(dist.distributed_c10d._world.pg_map):
        backend: Any = group._get_backend(cuda) if cuda in group._device_types else None
        if backend is not None and backend.name() == "nccl":  # groups of gloo have devices too
            backend._set_default_timeout(limit)


def record_memory(*, on: bool) -> None:
    """Begin or end the recording of CUDA's allocations, with their stacks."""
    torch.cuda.memory._record_memory_history(enabled="all" if on else None)


def save_memory(path: str) -> None:
    """Write the recorded allocations to a file."""
    torch.cuda.memory._dump_snapshot(path)


_NOTHING: AbstractContextManager[object] = nullcontext()


def annotate(name: str) -> AbstractContextManager[object]:
    """Return a context whose work has a name in the profile that is being recorded; it costs nothing without one."""
    return torch.profiler.record_function(name) if torch.autograd.profiler._is_profiler_enabled else _NOTHING


def unsharded_parameters(module: Any) -> Iterator[nn.Parameter]:
    """Yield the whole parameters with which the passes of an FSDPModule compute, after its first pass.

    They stay the same objects; FSDP2 gives them memory when it gathers them.
    """
    group = module._get_fsdp_state()._fsdp_param_group
    yield from () if group is None else (parameter.unsharded_param for parameter in group.fsdp_params)
