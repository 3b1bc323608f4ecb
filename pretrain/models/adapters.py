"""Low-rank adapters of linear layers (Hu et al. 2021, arXiv:2106.09685).

    W + (alpha / rank) · B A     W: weight (out, in), A: adapter_down.weight (rank, in), B: adapter_up.weight
                                 (out, rank)

A and B are ordinary parameters with names of their own, next to the layer's weight. B begins with zeros, so a model
with new adapters computes what it computed without them. Adapters are added to the weights when a trained model is used
or exported (`added`), so only training sees them.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.initial import Initial

DOWN, UP = "adapter_down", "adapter_up"
"""Names of the modules of A and B within their layer."""


class AdapterMap(nn.Linear):
    """A or B of an adapter.

    Args:
        inputs: width of its input.
        outputs: width of its output.
        std: standard deviation of its first values.
        fused: logical matrices of equal rows that it holds, one below the other.
        like: parameter whose device and type it has.
    """

    def __init__(self, inputs: int, outputs: int, std: float, fused: int, like: Tensor) -> None:
        self._std, self._fused = std, fused
        super().__init__(inputs, outputs, bias=False, device=like.device, dtype=like.dtype)

    def reset_parameters(self) -> None:
        """Draw first values from torch's default generator."""
        nn.init.normal_(self.weight, std=self._std)

    def own_initial(self, parameter: str) -> Initial:
        """Return the distribution of the first values (see `DeclaresInitial`)."""
        return Initial(self._std)

    def own_fused_matrices(self) -> dict[str, int]:
        """Return how many logical matrices the weight holds (see `FusesMatrices`)."""
        return {"weight": self._fused}


class AdaptedLinear(nn.Linear):
    """Linear layer with an adapter. Its own weight is `weight`, and `whole_weight` returns that of both together."""

    adapter_down: AdapterMap
    adapter_up: AdapterMap
    adapter_scale: float

    def forward(self, input: Tensor) -> Tensor:
        """Return W x + b + scale · B (A x). The small products are apart, so bf16 rounds no sum of weights."""
        own = F.linear(input, self.weight, self.bias)
        return own + self.adapter_scale * self.adapter_up(self.adapter_down(input))


def whole_weight(linear: nn.Linear) -> Tensor:
    """Return the weight of a linear layer, with its adapter if it has one, for code that uses a part of it."""
    if not isinstance(linear, AdaptedLinear):
        return linear.weight
    return linear.weight + linear.adapter_scale * (linear.adapter_up.weight @ linear.adapter_down.weight)


def adapt(linear: nn.Linear, rank: int, alpha: float, fused: int = 1) -> None:
    """Give a linear layer an adapter, in place. Its module, its parameters and their names stay.

    Args:
        linear: the layer.
        rank: rank of the adapter.
        alpha: its scale times the rank.
        fused: logical matrices of equal rows that the weight of the layer holds.
    """
    weight = linear.weight
    # The paper draws A from a normal distribution, and its authors' code with this deviation.
    linear.add_module(DOWN, AdapterMap(linear.in_features, rank, 1 / math.sqrt(3 * linear.in_features), 1, weight))
    linear.add_module(UP, AdapterMap(rank, linear.out_features, 0.0, fused, weight))
    linear.__class__ = AdaptedLinear  # as torch's parametrizations do: references to the layer stay valid
    linear.adapter_scale = alpha / rank  # type: ignore[assignment] # a number


def layer_of_adapter(name: str) -> str | None:
    """Return the weight that a parameter adapts, by name; None if the parameter belongs to no adapter."""
    layer, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{layer}.weight" if last in (DOWN, UP) and name.endswith(".weight") else None


def adapters_of(weight: str) -> tuple[str, str]:
    """Return the names of A and B of a layer's weight."""
    layer = weight.removesuffix(".weight")
    return f"{layer}.{DOWN}.weight", f"{layer}.{UP}.weight"


def added(down: Tensor, up: Tensor, scale: float, begin: int, end: int) -> Tensor:
    """Return what an adapter adds to a range of its layer's flattened weight: fp64.

    In fp64, ranges of any size have the same values after they are rounded to fp32.

    Args:
        down: (rank, in) A.
        up: (out, rank) B.
        scale: alpha / rank.
        begin: of the range.
        end: of the range, exclusive.
    """
    width = down.shape[1]
    first, last = begin // width, -(-end // width)
    rows = scale * (up[first:last].double() @ down.double())
    return rows.flatten()[begin - first * width : end - first * width]


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """Return the layers of a model that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model by name, without those that compute something else, and without adapters."""
    return {name: layer for name, layer in model.named_modules() if type(layer) in (nn.Linear, AdaptedLinear)}
