"""Feed-forward layers and their activations."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["relu", "squared_relu", "gelu", "gelu_tanh", "swiglu"]
"""Activation of a feed-forward layer. gelu_tanh approximates gelu by tanh, as jax.nn.gelu does by default."""


class FeedForward(nn.Module):
    """Two linear maps with an activation between them; SwiGLU (Shazeer 2020) has as many parameters as the others."""

    def __init__(
        self,
        width: int,
        activation: Activation,
        hidden: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """Build the layer.

        Args:
            width: channels of the input and of the output.
            activation: activation between the two maps.
            hidden: channels between the two maps; None means 4 times the width.
            bias: whether the maps have biases.
            dropout: share of the channels between the two maps that is dropped in training.
        """
        super().__init__()
        self.activation, self.dropout = activation, dropout
        hidden = 4 * width if hidden is None else hidden
        if activation == "swiglu":
            hidden = -(-2 * hidden // 3 // 8) * 8
            self.expand = nn.Linear(width, 2 * hidden, bias)
        else:
            self.expand = nn.Linear(width, hidden, bias)
        self.contract = nn.Linear(hidden, width, bias)

    def own_fused_matrices(self) -> dict[str, int]:
        """Return the matrices of SwiGLU's gate and value; see `FusesMatrices`."""
        return {"expand.weight": 2} if self.activation == "swiglu" else {}

    def forward(self, x: Tensor) -> Tensor:
        """Map (rows, length, width) to the same shape."""
        hidden = self.expand(x)
        if self.activation == "relu":
            hidden = F.relu_(hidden)
        elif self.activation == "squared_relu":
            hidden = _Square.apply(F.relu_(hidden))
        elif self.activation == "gelu":
            hidden = F.gelu(hidden)
        elif self.activation == "gelu_tanh":
            hidden = F.gelu(hidden, approximate="tanh")
        else:
            gate, value = hidden.chunk(2, -1)
            hidden = F.silu(gate) * value
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return self.contract(hidden)


class _Square(torch.autograd.Function):
    """Square x² whose backward pass reads and writes memory twice; torch's own does so four times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (gradient * x).mul_(2)
