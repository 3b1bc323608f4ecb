"""Context parallelism: each row of a micro-batch is cut over the ranks of a context group.

    context 2            row 0 of the micro-batch
    rank 0, index 0      positions 0 to T/2 - 1
    rank 1, index 1      positions T/2 to T - 1

A layer that reads other positions communicates within the group. The operations here are differentiable, and
torch.compile takes them. With one rank in a group they change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from byteloom.core.torch_compat import all_gather_single, reduce_scatter_single
from pretrain.distributed.world import World

_CONTEXTS: dict[str, "Context"] = {}
"""Contexts by name."""


@dataclass(frozen=True)
class Context:
    """This rank's part of each row."""

    index: int = 0
    """Number of the part in the row."""
    size: int = 1
    """Number of equal parts of a row, and of ranks in the group."""
    patches: int | None = None
    """Patches of a row, if the first dimension of a tensor counts the patches of all rows. None: a row's positions are
    a dimension."""
    group: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)
    """Ranks that have the parts. None: there is one, or tensors are on the meta device."""

    @classmethod
    def of(cls, world: World, size: int) -> Self:
        """Return the context of this rank; groups are consecutive ranks. All ranks call it.

        Args:
            world: the ranks of the run.
            size: ranks of a group; it divides the number of ranks.
        """
        return cls() if size == 1 else cls(world.rank % size, size, group=world.subgroup(size))

    def __post_init__(self) -> None:
        _CONTEXTS[self.name] = self

    @property
    def name(self) -> str:
        """Name by which operations of a compiled graph find the context. They cannot take a group."""
        group = "no group" if self.group is None else self.group.group_name
        return f"part {self.index} of {self.size}, {group}"

    @property
    def cuts_positions(self) -> bool:
        """Positions are a dimension of tensors, and this rank has a part of them."""
        return self.size > 1 and self.patches is None

    def over_patches(self, patches: int) -> Self:
        """Return the context of tensors whose first dimension counts the patches of all rows."""
        return replace(self, patches=patches)

    def own(self, length: int) -> slice:
        """Return this rank's part of a row of `length` positions, which the number of ranks divides."""
        part = length // self.size
        return slice(self.index * part, (self.index + 1) * part)

    def first(self, positions: int) -> int:
        """Return the place in the row of the first of a tensor's positions, if they are a dimension; else 0."""
        return self.index * positions if self.cuts_positions else 0

    def placed(self, x: Tensor) -> Tensor:
        """Map (rows, n) values of this rank's positions to those of whole rows; zeros at the positions of others."""
        part = x.shape[1]
        return F.pad(x, (self.index * part, (self.size - 1 - self.index) * part))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Return the parts of all ranks, concatenated along a dimension."""
        if self.size == 1:
            return x
        gathered = _gather(x.movedim(dim, 0), self.name)
        return gathered.movedim(0, dim)

    def scattered_sum(self, x: Tensor, dim: int) -> Tensor:
        """Return this rank's part, along a dimension, of the sum over the ranks; it is summed in fp32 or better."""
        return x if self.size == 1 else _scatter(x.movedim(dim, 0), self.name).movedim(0, dim)

    def of_first(self, x: Tensor) -> Tensor:
        """Return the tensor of the group's first rank."""
        return x if self.size == 1 else self.gather(x[None], 0)[0]

    def halo(self, x: Tensor) -> Tensor:
        """Return the tensor of the rank before this one; zeros on the first rank."""
        if self.size == 1:
            return torch.zeros_like(x)
        return _halo(x, self.name, True)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks of the group, without gradient."""
        if self.group is not None:
            x = x.clone()
            dist.all_reduce(x, group=self.group)
        return x

    def dropout(self, x: Tensor, share: float, dim: int = 1) -> Tensor:
        """Drop elements as one process does over whole rows: the whole row's mask is drawn, and this rank's part used.

        Args:
            x: values of this rank's positions.
            share: share of the elements that is dropped.
            dim: dimension of the positions; without meaning if the first dimension counts patches.
        """
        if self.size == 1 or share == 0:
            return F.dropout(x, share)
        shape = list(x.shape)
        if self.patches is None:
            shape[dim] *= self.size
            return x * dropout_factors(x, shape, share, dim, self.own(shape[dim]))
        part = self.patches // self.size
        whole = [len(x) // part, self.patches, *shape[1:]]
        return x * dropout_factors(x, whole, share, 1, self.own(self.patches)).view(shape)


WHOLE_ROWS = Context()
"""Context of a process that has whole rows."""


def group_of(rank: int, ranks: int, context: int) -> tuple[int, int]:
    """Return the number of a rank's context group, and the number of groups. Groups take micro-batches in turn."""
    return rank // context, ranks // context


def context_named(name: str) -> Context:
    """Return the context of a name."""
    return _CONTEXTS[name]


def shift(x: Tensor, context: Context) -> tuple[Tensor, Any]:
    """Begin to send a tensor to the next rank of the group, around; return that of the rank before, and a handle.

    Call `wait` of the handle before reading the tensor, and keep `x` until then.
    """
    index, size = context.index, context.size
    return _exchange(x, context, to=(index + 1) % size, source=(index - 1) % size)


def _exchange(x: Tensor, context: Context, to: int | None, source: int | None) -> tuple[Tensor, Any]:
    """Begin to send a contiguous tensor to one rank of the group, and to receive one from another.

    Without a source the received tensor is zeros.
    """
    ranks = range(context.size)
    sent_lengths, received_lengths = ([x.numel() if rank == other else 0 for rank in ranks] for other in (to, source))
    received = torch.zeros_like(x) if source is None else torch.empty_like(x)
    sent, into = x.view(-1)[: sum(sent_lengths)], received.view(-1)[: sum(received_lengths)]
    work = dist.all_to_all_single(into, sent, received_lengths, sent_lengths, group=context.group, async_op=True)
    return received, work


def dropout_factors(like: Tensor, shape: Sequence[int], share: float, dim: int, part: slice) -> Tensor:
    """Return factors by which dropout multiplies a part of a tensor: 0, or 1 / (1 - share).

    Args:
        like: tensor of the type and device.
        shape: shape of the whole tensor, for which the generator draws.
        share: share of the elements that is dropped.
        dim: dimension of the part.
        part: range of the part.
    """
    length = part.stop - part.start
    if like.device.type == "cpu":  # the draws of F.dropout in a quarter of the memory
        kept = torch.empty(shape, dtype=torch.bool).bernoulli_(1 - share)
        return (
            kept.narrow(dim, part.start, length).to(like.dtype, memory_format=torch.contiguous_format).div_(1 - share)
        )
    return F.dropout(like.new_ones(shape), share).narrow(dim, part.start, length).clone()  # frees the rest


@torch.library.custom_op("byteloom::context_gather", mutates_args=())
def _gather(x: Tensor, name: str) -> Tensor:
    """Return the tensors of all ranks, concatenated along the first dimension."""
    context = context_named(name)
    gathered = x.new_empty(context.size * x.shape[0], *x.shape[1:])
    all_gather_single(gathered, x.contiguous(), group=context.group)
    return gathered


@torch.library.custom_op("byteloom::context_scatter", mutates_args=())
def _scatter(x: Tensor, name: str) -> Tensor:
    """Return this rank's part of the sum of the tensors of all ranks. The sum is fp32 or more precise."""
    context, precise = context_named(name), x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    part = precise.new_empty(x.shape[0] // context.size, *x.shape[1:])
    reduce_scatter_single(part, precise, group=context.group)
    return part.to(x.dtype)


@torch.library.custom_op("byteloom::context_halo", mutates_args=())
def _halo(x: Tensor, name: str, forward: bool) -> Tensor:
    """Return the tensor of the rank before, or else of the rank after; zeros where there is none."""
    context = context_named(name)
    before = context.index - 1 if context.index else None
    after = context.index + 1 if context.index + 1 < context.size else None
    received, arrival = _exchange(x.contiguous(), context, *((after, before) if forward else (before, after)))
    arrival.wait()
    return received


@_gather.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return x.new_empty(context_named(name).size * x.shape[0], *x.shape[1:])


@_scatter.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return x.new_empty(x.shape[0] // context_named(name).size, *x.shape[1:])


@_halo.register_fake
def _(x: Tensor, name: str, forward: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_name(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.name = inputs[1]


_gather.register_autograd(lambda ctx, gradient: (_scatter(gradient, ctx.name), None), setup_context=_keep_name)
_scatter.register_autograd(lambda ctx, gradient: (_gather(gradient, ctx.name), None), setup_context=_keep_name)
_halo.register_autograd(lambda ctx, gradient: (_halo(gradient, ctx.name, False), None, None), setup_context=_keep_name)
