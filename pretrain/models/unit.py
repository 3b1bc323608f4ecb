"""The unit of activation checkpointing, of compilation and of sharding."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class Unit(nn.Module):
    """One of the alike blocks that a model is a pile of. An engine says how it is run."""

    recomputed = False
    """Whether backward computes the activations within the block again, so that forward keeps its input alone."""
    cast: torch.dtype | None = None
    """What the block's parameters are cast to in every pass; the cast is part of the graph. None: they are as they are
    to be used."""


def run_unit(unit: nn.Module, *arguments: Any) -> Tensor:
    """The unit's output, in the way that its engine asked for."""
    assert isinstance(unit, Unit)

    def forward(*xs: Any) -> Tensor:
        if (dtype := unit.cast) is None:
            return unit(*xs)
        return functional_call(unit, {name: p.to(dtype) for name, p in unit.named_parameters()}, xs)

    if unit.recomputed and torch.is_grad_enabled():
        return checkpoint(forward, *arguments, use_reentrant=False)
    return forward(*arguments)
