"""Negative log-likelihood of ids under a linear head, without the logits of all positions at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4096
"""Positions whose logits exist at once: 4 MiB in fp32, which fit into a CPU's caches. A million would take 1 GiB."""


def linear_nats(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of ids under the logits `x @ weight.T + bias`, chunk by chunk.

    The backward pass recomputes the logits. It sums the gradients of weight and bias over chunks, in the precision of
    the result.

    Args:
        x: (n, width) last hidden states.
        ids: (n,) integers below VOCABULARY.
        weight: (VOCABULARY, width)
        bias: (VOCABULARY,), or None.

    Returns:
        (n,) nats in fp32 or more precise.
    """
    return _LinearNats.apply(x, ids, weight, bias)


class _LinearNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, ids, weight, bias)
        chunks = zip(x.split(CHUNK), ids.split(CHUNK), strict=True)
        return torch.cat([F.cross_entropy(_logits(part, weight, bias), i, reduction="none") for part, i in chunks])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None]:
        x, ids, weight, bias = ctx.saved_tensors
        of_x = torch.empty_like(x)
        of_weight = torch.zeros_like(weight, dtype=gradient.dtype)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=gradient.dtype)
        for first in range(0, len(x), CHUNK):
            part = slice(first, first + CHUNK)
            of_logits = _logits(x[part], weight, bias).softmax(1)
            of_logits.scatter_add_(1, ids[part, None], of_logits.new_full((len(of_logits), 1), -1))
            of_logits *= gradient[part, None]
            if of_bias is not None:
                of_bias += of_logits.sum(0)
            of_logits = of_logits.to(x.dtype)
            torch.mm(of_logits, weight, out=of_x[part])
            of_weight += of_logits.t() @ x[part]
        return of_x, None, of_weight.to(weight.dtype), None if of_bias is None else of_bias.to(weight.dtype)


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits in fp32 or more precise."""
    return F.linear(x, weight, bias).to(torch.promote_types(x.dtype, torch.float32))
