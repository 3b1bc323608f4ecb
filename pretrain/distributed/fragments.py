"""Fragments: named flat ranges of fp32 tensors, which an engine hands out and a checkpoint stores.

A fragment's name is KIND/NAME. The kind is MODEL for masters of parameters, exp_avg and exp_avg_sq for Adam's moments,
momentum_buffer for Muon's, and MEMORY for what a model carries in each row from one batch to the next.
"""

from dataclasses import dataclass

from torch import Tensor

MODEL = "model"
"""Kind of the masters of parameters."""
MEMORY = "memory"
"""Kind of a model's memory, a tensor with the rows of the global batch."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of a flattened tensor, held by this process.

    Every engine keeps its masters and moments in this form: whole tensors (one process, DDP), rows (FSDP2), or any
    ranges (ZeRO).
    """

    name: str
    """KIND/NAME, as `fragment_name` makes it."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    """Start of the range in the flattened tensor, in elements."""
    data: Tensor
    """Flat fp32 view of the live values. Loading a checkpoint writes into it."""

    def share(self, part: int, parts: int) -> "Fragment":
        """Return one of several parts of about equal length, which together make up the fragment."""
        return self.part(*(len(self.data) * number // parts for number in (part, part + 1)))

    def part(self, begin: int, end: int) -> "Fragment":
        """Return a range of the fragment, in elements of it."""
        return Fragment(self.name, self.shape, self.start + begin, self.data[begin:end])


def whole(name: str, tensor: Tensor) -> Fragment:
    """Return the fragment that holds all of a tensor."""
    return Fragment(name, tuple(tensor.shape), 0, tensor.detach().view(-1))


def fragment_name(kind: str, name: str) -> str:
    """Return the name of the fragments of a kind, for a parameter or a tensor of the memory."""
    return f"{kind}/{name}"


def split_name(fragment: str) -> tuple[str, str]:
    """Return the kind of a fragment, and the name of its parameter or tensor, by the fragment's name."""
    kind, _, name = fragment.partition("/")
    return kind, name
