"""The unit of activation checkpointing and of compilation."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class Unit(nn.Module):
    """One of the alike blocks that a model is a pile of."""

    recomputed = False
    """Whether backward computes the activations within the block again, so that forward keeps its input alone."""


def run_unit(unit: nn.Module, *arguments: Any) -> Tensor:
    """The unit's output, in the way that its `recomputed` asks for."""
    if not (unit.recomputed and torch.is_grad_enabled()):
        return unit(*arguments)
    # Those of this pass: an engine may have put cast copies in the masters' place, until the pass ends.
    parameters: dict[str, Tensor] = dict(unit.named_parameters())
    return checkpoint(lambda *xs: functional_call(unit, parameters, xs), *arguments, use_reentrant=False)
