"""The unit of activation checkpointing, of compilation and of sharding."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from byteloom.core.torch_compat import ATTENTION, argument_names
from pretrain.kernels import amx_attention

_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    *ATTENTION,
    amx_attention.OPERATION,
}
"""Matrix products and attention: nearly all of a block's work."""


class Unit(nn.Module):
    """One of the alike blocks that a model is a pile of. An engine says how it is run."""

    keeps: Literal["all", "products", "input"] = "all"
    """What forward keeps for backward, which computes the rest of the block again: beside its input, all that backward
    needs, or the outputs of matrix products and attention, or nothing."""
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

    if unit.keeps == "all" or not torch.is_grad_enabled():
        return forward(*arguments)
    how: dict[str, Any] = {"context_fn": _keep_products} if unit.keeps == "products" else {}
    return checkpoint(forward, *arguments, use_reentrant=False, **how)


def keeps(_: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Whether the output of an operation is kept where products are.

    torch's attention that drops weights is not: to skip it would be to skip its random numbers, and shift all after.
    """
    if operation not in PRODUCTS:
        return CheckpointPolicy.PREFER_RECOMPUTE
    given = dict(zip(argument_names(operation), arguments, strict=False)) | options
    return CheckpointPolicy.PREFER_RECOMPUTE if given.get("dropout_p") else CheckpointPolicy.MUST_SAVE


_keep_products = partial(
    create_selective_checkpoint_contexts,
    keeps,
    allow_cache_entry_mutation=True,  # relu_ writes over a kept product; doing so again changes nothing
)
