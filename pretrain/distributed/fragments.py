"""What an engine hands out and a checkpoint stores: named flat ranges of fp32 tensors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A range, contiguous in the flattened tensor, that this process holds.

    Every engine keeps its masters and moments so: whole (one process, DDP), rows (FSDP2), any range (ZeRO).
    """

    name: str
    """KIND/PARAMETER, with kind model, exp_avg and exp_avg_sq (Adam's moments) or momentum_buffer (Muon's); memory/NAME
    for what the model carries in each row."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    """Of the range in the flattened tensor."""
    data: Tensor
    """Flat fp32 view of the live values; reading a checkpoint writes into it."""

    def share(self, part: int, parts: int) -> "Fragment":
        """One of so many parts of it, about as long as the others; together they are all of it."""
        first, last = (len(self.data) * number // parts for number in (part, part + 1))
        return Fragment(self.name, self.shape, self.start + first, self.data[first:last])


def whole(name: str, tensor: Tensor) -> Fragment:
    """The fragment that is all of a tensor."""
    return Fragment(name, tuple(tensor.shape), 0, tensor.detach().view(-1))
