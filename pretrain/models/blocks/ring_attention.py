"""Causal attention of rows that are cut over ranks: each rank has the queries, keys and values of its positions.

Keys and values travel around the ranks as one tensor, a part at a time (ring attention, Liu et al. 2023,
arXiv:2310.01889). Each rank attends to the parts before its own, and merges the results by their normalizers:

    step        0          1          2          3
    rank 0      0          -          -          -
    rank 1      1          0          -          -          the part of the keys to which a rank attends;
    rank 2      2          1          0          -          it is causal in step 0 only
    rank 3      3          2          1          0

A rank keeps its own keys and values for backward, and the gradients of a part travel with it. Memory is that of two
parts at any length. The last rank computes about twice as much attention as the average of the ranks.
"""

from typing import Any

import torch
from torch import Tensor

from byteloom.core.torch_compat import flash_attention_backward, flash_attention_forward
from pretrain.distributed.context import Context, context_named, shift


def ring_attention(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """Return causal attention over the keys of all ranks.

    Args:
        q: (rows, heads, n, d), of this rank's positions.
        k: as q.
        v: as q.
        context: this rank's part of the rows; its positions are a dimension.

    Returns:
        (rows, heads, n, d)
    """
    out: Tensor = _forward(q, k, v, context.name)[0]
    return out


def merged(out: Tensor, log_sum: Tensor, other: Tensor, other_log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention over the keys of two results, and the logarithm of its normalizer.

    Args:
        out: (rows, heads, n, d) fp32 attention over the first keys.
        log_sum: (rows, heads, n) fp32 logarithm of its normalizer.
        other: as out, of the other keys.
        other_log_sum: as log_sum.
    """
    both = torch.logaddexp(log_sum, other_log_sum)
    out = out * (log_sum - both).exp()[..., None] + other * (other_log_sum - both).exp()[..., None]
    return out, both


def by_position(x: Tensor) -> Tensor:
    """Return (rows, heads, n, d) values in a layout in which the heads of a position follow each other."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.custom_op("byteloom::ring_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return attention, and the logarithm of each query's normalizer, (rows, heads, n) fp32."""
    context, part = context_named(name), torch.stack([k, v])
    out, log_sum = q.new_zeros(()), q.new_zeros(())
    for step in range(context.size):
        following = shift(part, context) if step + 1 < context.size else None
        if step == 0:
            out, log_sum = flash_attention_forward(q, k, v, causal=True)
            out = out.to(log_sum.dtype)
        elif step <= context.index:
            k, v = part
            other, other_log_sum = flash_attention_forward(q, k, v, causal=False)
            out, log_sum = merged(out, log_sum, other, other_log_sum)
        if following is not None:
            arrived, arrival = following
            arrival.wait()
            part = arrived
    return by_position(out.to(q.dtype)), log_sum.contiguous()


@torch.library.custom_op("byteloom::ring_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values.

    A kernel's backward pass takes the result and the normalizers over all keys, and returns the share of its keys.
    """
    context, part = context_named(name), torch.stack([k, v])
    of_q = torch.zeros_like(q, dtype=log_sum.dtype)
    of_part = torch.zeros_like(part, dtype=log_sum.dtype)
    for step in range(context.size):
        following = shift(part, context) if step + 1 < context.size else None
        if step <= context.index:
            k, v = part
            of_this, *of_these = flash_attention_backward(gradient, q, k, v, out, log_sum, causal=step == 0)
            of_q += of_this
            of_part += torch.stack(of_these)
        if context.size > 1:
            of_part, arrival = shift(of_part, context)
            arrival.wait()
        if following is not None:
            arrived, arrival = following
            arrival.wait()
            part = arrived
    of_k, of_v = of_part.to(q.dtype).unbind()
    return by_position(of_q.to(q.dtype)), by_position(of_k.clone()), by_position(of_v.clone())  # results share nothing


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return by_position(torch.empty_like(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (by_position(torch.empty_like(x)) for x in (q, k, v))
    return of_q, of_k, of_v


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.name = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(gradient, *ctx.saved_tensors, ctx.name), None


_forward.register_autograd(_gradients, setup_context=_keep)
OPERATION = torch.ops.byteloom.ring_attention.default
"""Operation of the forward pass, for torch's dispatcher."""
