"""Normalization layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.blocks.embedding import sums_in_bf16
from pretrain.models.initial import Initial


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the last dimension (Ba et al. 2016), which begins as the identity map.

    The gradients of weight and bias are summed in fp32. In bf16 on a CPU, torch sums them over all positions in bf16.
    At 8,192 positions, 85 % of a bias' gradient was lost, also with an fp32 bias (torch 2.13).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (…, width) values."""
        if sums_in_bf16(input):
            done: Tensor = _LayerNorm.apply(input, self.weight, self.bias, self.eps)
            return done
        return super().forward(input)

    def own_initial(self, parameter: str) -> Initial:
        """Return the constant 1 for the weight and the constant 0 for the bias."""
        return Initial(mean=float(parameter == "weight"))


class _LayerNorm(torch.autograd.Function):
    """Layer normalization by torch's kernels, apart from the sums of gradients over positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, mean, scale = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        of_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x, x.shape[-1:], mean, scale, weight, bias, [True, False, False]
        )
        of_positions = gradient.flatten(0, -2)
        normal = F.layer_norm(x, x.shape[-1:], eps=ctx.eps).flatten(0, -2)
        of_weight = (of_positions * normal).sum(0, dtype=torch.float32)
        return of_x, of_weight, of_positions.sum(0, dtype=torch.float32), None


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square over the last dimension (Zhang and Sennrich 2019), times a weight from 1 on."""

    def __init__(self, width: int) -> None:
        """Make the norm of `width` channels."""
        super().__init__(width, eps=1e-5)

    def own_initial(self, parameter: str) -> Initial:
        """Return the constant 1 for the weight."""
        return Initial(mean=1.0)
