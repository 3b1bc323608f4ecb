"""Attention of latents to inputs, both cut over ranks: each rank attends to its inputs, and the results are merged.

queries of N / C latents ─ gather ─▶ queries of N ─▶ attention to T / C inputs, and its normalizers
│ of all ranks
(N / C) results ◀─ sum over ranks ─ weighted by share of the normalizers
"""

from typing import Any

import torch
from torch import Tensor

from byteloom.core.torch_compat import flash_attention_backward, flash_attention_forward
from pretrain.distributed.context import Context, context_named
from pretrain.models.blocks.ring_attention import by_position

HIDDEN = -1e9
"""Number added to the scores of inputs that a latent does not see. It is finite, because a rank may have no other."""


def merged_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, context: Context) -> Tensor:
    """Return attention to the inputs of all ranks.

    Args:
        q: (rows, heads, N / C, d) queries of this rank.
        k: (rows, heads, T / C, d) keys of this rank.
        v: as k.
        mask: (rows, 1, N, T / C) finite numbers that are added to the scores of all queries with this rank's keys.
        context: this rank's part of the queries and of the inputs.

    Returns:
        (rows, heads, N / C, d)
    """
    out: Tensor = _forward(q, k, v, mask, context.name)[0]
    return out


@torch.library.custom_op("byteloom::merged_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return attention, and the logarithm of the normalizer of the queries of all ranks, (rows, heads, N) fp32."""
    context = context_named(name)
    out, log_sum = flash_attention_forward(context.gather(q, 2), k, v, causal=False, mask=mask)
    total = context.gather(log_sum[None], 0).logsumexp(0)
    part = out.to(total.dtype) * (log_sum - total).exp()[..., None]
    return by_position(context.scattered_sum(part, 2).to(q.dtype)), total


@torch.library.custom_op("byteloom::merged_attention_backward", mutates_args=())
def _backward(gradient: Tensor, kept: list[Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, from the tensors that `_keep` kept."""
    context, (q, k, v, mask, out, total) = context_named(name), kept
    queries, all_out, all_gradient = context.gather(torch.stack([q, out, gradient]), 3)
    of_queries, of_k, of_v = flash_attention_backward(
        all_gradient, queries, k, v, all_out, total, causal=False, mask=mask
    )
    return by_position(context.scattered_sum(of_queries, 2)), by_position(of_k), by_position(of_v)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return by_position(torch.empty_like(q)), q.new_empty(*q.shape[:2], mask.shape[2], dtype=torch.float32)


@_backward.register_fake
def _(gradient: Tensor, kept: list[Tensor], name: str) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (by_position(torch.empty_like(x)) for x in kept[:3])
    return of_q, of_k, of_v


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.name = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(gradient, list(ctx.saved_tensors), ctx.name), None, None


_forward.register_autograd(_gradients, setup_context=_keep)
OPERATION = torch.ops.byteloom.merged_attention.default
"""Operation of the forward pass, for torch's dispatcher."""
