"""Unit of activation checkpointing, compilation and sharding."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from byteloom.core.torch_compat import ATTENTION, annotate, argument_names
from pretrain.kernels import amx_attention, mamba2
from pretrain.models.blocks import merged_attention, ring_attention

_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    *ATTENTION,
    amx_attention.OPERATION,
    mamba2.OPERATION,
    merged_attention.OPERATION,
    ring_attention.OPERATION,
}
"""Operations of matrix products and attention, which are nearly all of a block's work."""


class Unit(nn.Module):
    """Repeated block of a model. An engine sets how it runs."""

    keeps: Literal["all", "products", "input"] = "all"
    """Values that the forward pass keeps for the backward pass, which recomputes the others. all: all that it needs.
    products: the input, and the outputs of matrix products and attention. input: the input."""
    name = "block"
    """Name of the block in the model, for profiles."""
    weights: Callable[[], dict[str, Tensor]] | None = None
    """Function that returns what a pass uses in place of the block's parameters, by name. None: it uses these."""


def run_unit(unit: nn.Module, *arguments: Any) -> Tensor:
    """Return a unit's output, with the weights and the checkpointing that its engine set.

    Args:
        unit: the block, a `Unit`.
        *arguments: passed to its forward pass.
    """
    assert isinstance(unit, Unit)

    def forward(*xs: Any) -> Tensor:
        with annotate(unit.name):
            return unit(*xs) if unit.weights is None else functional_call(unit, unit.weights(), xs)

    if unit.keeps == "all" or not torch.is_grad_enabled():
        return forward(*arguments)
    how: dict[str, Any] = {"context_fn": _keep_products} if unit.keeps == "products" else {}
    return checkpoint(forward, *arguments, use_reentrant=False, **how)


def keeps(_: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Return whether the output of an operation is kept where products are kept.

    Attention with dropout in torch's kernels is recomputed. Skipping it would desynchronize the random generator.
    """
    if operation not in PRODUCTS:
        return CheckpointPolicy.PREFER_RECOMPUTE
    given = dict(zip(argument_names(operation), arguments, strict=False)) | options
    return CheckpointPolicy.PREFER_RECOMPUTE if given.get("dropout_p") else CheckpointPolicy.MUST_SAVE


_keep_products = partial(
    create_selective_checkpoint_contexts,
    keeps,
    allow_cache_entry_mutation=True,  # relu_ overwrites a kept product; a second relu_ changes nothing
)
