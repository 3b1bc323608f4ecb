"""Embedding tables."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """Embedding table whose gradient is summed in fp32.

    In bf16 on a CPU, torch sums the gradients of all positions with an id in bf16. At 1,024 positions an id, a quarter
    of the gradient was lost (torch 2.13).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map ids to their vectors."""
        if sums_in_bf16(self.weight):
            found: Tensor = _Lookup.apply(self.weight, input)
            return found
        return super().forward(input)


class _Lookup(torch.autograd.Function):
    """Lookup in a table."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.symbols = len(table)
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        return torch.ops.aten.embedding_dense_backward(gradient.float(), ids, ctx.symbols, -1, False), None


def sums_in_bf16(values: Tensor) -> bool:
    """Return whether torch's kernels for a tensor sum gradients over positions in bf16; CUDA's sum in fp32."""
    return values.dtype == torch.bfloat16 and values.device.type == "cpu" and torch.is_grad_enabled()


def embedding(symbols: int, width: int) -> Embedding:
    """Return an embedding table of shape (symbols, width) without values.

    The model sets them. The constructor of nn.Embedding would draw values, which on the meta device imports torch's
    compiler.
    """
    table: Embedding = Embedding.from_pretrained(torch.empty(symbols, width), freeze=False)
    return table
