"""Rules without parameters: by class of the bytes, and by position."""

import torch
from torch import Tensor

from pretrain.models.patching.patcher import Decision, Patcher, PatchState


class ByteClass(Patcher):
    """A patch starts at the first spacelike byte of a run: neither a digit, a letter nor a continuation of UTF-8."""

    def rule(self, read: Tensor, state: PatchState, hidden: Tensor | None) -> Decision:
        """Return where runs of spacelike bytes begin."""
        spacelike = is_spacelike(read)
        before = torch.cat([is_spacelike(state.last)[:, None], spacelike[:, :-1]], 1)
        return Decision(spacelike & ~before)


class Fixed(Patcher):
    """A patch starts at every multiple of its size."""

    def __init__(self, capacity: int, size: int) -> None:
        """Make the rule of patches of `size` positions."""
        super().__init__(capacity)
        self.size = size

    def rule(self, read: Tensor, state: PatchState, hidden: Tensor | None) -> Decision:
        """Return the multiples of the size."""
        places = torch.arange(state.length, state.length + read.shape[1], device=read.device)
        return Decision((places % self.size == 0).expand(read.shape))


def is_spacelike(ids: Tensor) -> Tensor:
    """Return which ids are spacelike: all but digits, letters and the bytes 0x80 to 0xBF. SEPARATOR is spacelike."""
    letter = ids | 0x20  # lower case
    word = ((ids >= 0x30) & (ids <= 0x39)) | ((letter >= 0x61) & (letter <= 0x7A))
    return ~(word | ((ids >= 0x80) & (ids <= 0xBF)))
