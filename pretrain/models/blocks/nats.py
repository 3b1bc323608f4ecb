"""Negative log-likelihood of ids under a linear head, without the logits of all positions at once.

Libraries that fuse the head with its loss were read in 2026. None fits 258 columns and a step that never waits:

- linear_cross_entropy of torch 2.13 computes gradients in the forward pass when it works in chunks. torch 2.11 and 2.12
  lack it.
- Liger-Kernel has V / width chunks, rounded up: one, with all logits at once. It reads the number of targets on the
  host.
- Cut Cross-Entropy keeps no logits, and skips small gradients by default. Its authors advise the compiled form with all
  logits where the vocabulary is smaller than the width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_CHUNK = 4096
"""Positions whose logits exist at once on a CPU: 4 MiB in fp32, which fit into its caches. A million take 1 GiB."""

CUDA_CHUNK = 16_384
"""Positions whose logits exist at once on CUDA: 17 MiB in fp32, which fit into the cache of an H100 (50 MB). A product
over them has 384 tiles of 128 by 128 for 132 processors. One over 4,096 positions leaves a quarter of them idle."""

CUDA_COLUMNS = 8
"""Divisor of a product's columns on CUDA: fast kernels load 16 bytes at once. 264 columns take as many tiles of 128 as
320 do, the next multiple of 64, and 18 % fewer bytes."""


def linear_nats(x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
    """Return the cross-entropy of ids under the logits `x @ weight.T + bias`, chunk by chunk.

    The backward pass recomputes the logits. It sums the gradients of weight and bias over chunks, in the precision of
    the result. It computes no gradient of what is frozen.

    Args:
        x: (n, width) last hidden states.
        ids: (n,) integers below VOCABULARY.
        weight: (VOCABULARY, width)
        bias: (VOCABULARY,), or None.
        z_loss: factor of log² Z in the gradient, where Z is the sum of the exponentials of a position's logits. The
            result is without this term, so it stays a negative log-likelihood.

    Returns:
        (n,) nats in fp32 or more precise.
    """
    return _LinearNats.apply(x, ids, weight, bias, z_loss)


def chunk_size(device: torch.device) -> int:
    """Return the positions whose logits exist at once. The meta device counts as CUDA."""
    return CPU_CHUNK if device.type == "cpu" else CUDA_CHUNK


def columns_multiple(device: torch.device) -> int:
    """Return the divisor of the columns of the head's products."""
    return CUDA_COLUMNS if device.type == "cuda" else 1


class _LinearNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weight: Tensor, bias: Tensor | None, z_loss: float) -> Tensor:
        ctx.save_for_backward(x, ids, weight, bias)
        ctx.z_loss = z_loss
        head, size = _Head(weight, bias), chunk_size(x.device)
        chunks = zip(x.split(size), ids.split(size), strict=True)
        return torch.cat([F.cross_entropy(head.logits(part), i, reduction="none") for part, i in chunks])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, ids, weight, bias = ctx.saved_tensors
        is_needed = ctx.needs_input_grad
        of_x = torch.empty_like(x) if is_needed[0] else None
        of_weight = torch.zeros_like(weight, dtype=gradient.dtype) if is_needed[2] else None
        of_bias = torch.zeros_like(bias, dtype=gradient.dtype) if is_needed[3] else None
        head, size = _Head(weight, bias), chunk_size(x.device)
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            logits = head.logits(x[part])
            of_logits = logits.softmax(1)
            if ctx.z_loss:  # the derivative of log² Z by the logits is 2 log Z softmax
                of_logits *= 1 + 2 * ctx.z_loss * logits.logsumexp(1, keepdim=True)
            of_logits.scatter_add_(1, ids[part, None], of_logits.new_full((len(of_logits), 1), -1))
            of_logits *= gradient[part, None]
            if of_bias is not None:
                of_bias += of_logits.sum(0)
            of_logits = head.padded(of_logits.to(x.dtype))
            if of_x is not None:
                torch.mm(of_logits, head.weight, out=of_x[part])
            if of_weight is not None:
                of_weight += (of_logits.t() @ x[part])[: len(weight)]
        of_weight, of_bias = (None if each is None else each.to(weight.dtype) for each in (of_weight, of_bias))
        return of_x, None, of_weight, of_bias, None


class _Head:
    """Linear head whose columns are padded to a number that is fast on its device."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._columns = len(weight)
        self._spare = -self._columns % columns_multiple(weight.device)
        self.weight = F.pad(weight, (0, 0, 0, self._spare)) if self._spare else weight
        self._bias = None if bias is None else self.padded(bias)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits in fp32 or more precise."""
        logits = F.linear(x, self.weight, self._bias)[:, : self._columns]
        return logits.to(torch.promote_types(x.dtype, torch.float32))

    def padded(self, x: Tensor) -> Tensor:
        """Return a tensor of (..., VOCABULARY) with zeros in further columns."""
        return F.pad(x, (0, self._spare)) if self._spare else x
