"""What an engine hands out and a checkpoint stores: named flat ranges of fp32 tensors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A range, contiguous in the flattened tensor, that this process owns.

    Every engine keeps its masters and moments so: whole (one process, DDP), rows (FSDP2), any range (ZeRO).
    """

    name: str
    """KIND/PARAMETER, with kind model, exp_avg or exp_avg_sq; memory/NAME for what the model carries in each row."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Of the range in the flattened tensor."""
    data: Tensor
    """Flat fp32 view of the live values; reading a checkpoint writes into it."""


def whole(name: str, tensor: Tensor) -> Fragment:
    """The fragment that is all of a tensor."""
    return Fragment(name, tuple(tensor.shape), 0, tensor.detach().view(-1))
