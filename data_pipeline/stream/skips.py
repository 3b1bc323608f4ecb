"""Sequences that a run skips, and the sequences of its steps around them.

    sequence        0  1  2  3  4  5  6  7  8  9 …
    skipped                  3  4  5                ranges [(3, 3)]
    taken from 1       1  2           6  7  8       the first five that are not skipped

A run skips sequences because its numbers were bad when it read them (docs/guides/operation/health.md). The
ranges are part of its record. The sequences of a step follow from the ranges and a first sequence. No rank or world
size appears.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Skips:
    """Ranges of sequences that no step reads.

    Args:
        ranges: (first, count) of each range, in any order. They may overlap.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.ranges = _merged(ranges)
        """(first, count) of each range, in order, with read sequences between them."""
        firsts, counts = np.array(self.ranges, np.int64).reshape(-1, 2).T
        self._firsts, self._ends = firsts, firsts + counts
        self._before = np.concatenate(([0], np.cumsum(counts)))
        """Skipped sequences before each range, and in all."""

    def before(self, sequence: int) -> int:
        """Return how many sequences before this one are skipped."""
        number = int(self._firsts.searchsorted(sequence))
        if not number:
            return 0
        return int(self._before[number] - max(0, self._ends[number - 1] - sequence))

    def within(self, first: int, end: int) -> int:
        """Return how many of the sequences from `first` to before `end` are skipped."""
        return self.before(end) - self.before(first)

    def take(self, first: int, numbers: ArrayLike) -> NDArray[np.int64]:
        """Return sequences by their numbers among those that are not skipped, counted from sequence `first` on."""
        kept = np.asarray(numbers, np.int64) + (first - self.before(first))
        ranges = (self._firsts - self._before[:-1]).searchsorted(kept, side="right")
        sequences: NDArray[np.int64] = kept + self._before[ranges]
        return sequences

    def end(self, first: int, count: int) -> int:
        """Return the sequence after the first `count` that are not skipped, counted from `first` on."""
        return int(self.take(first, count - 1)) + 1 if count else first


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, count in sorted(ranges):
        if merged and first <= sum(merged[-1]):
            begin, length = merged[-1]
            merged[-1] = (begin, max(length, first + count - begin))
        elif count:
            merged.append((first, count))
    return merged
