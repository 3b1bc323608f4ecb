"""Order of an epoch: the place of sequence number g of a run in a corpus, for any g, by arithmetic.

    epoch, k = divmod(g, sequences_per_epoch)
    lane, position = k % lanes, k // lanes
    start = (lane * sequences_per_lane + position) * sequence_length     # in the epoch
    a binary search over prefix sums finds the extent, another the block in it

An epoch is the corpus as a ring of permuted extents (a few adjacent blocks each). The ring is opened at a place that
differs from epoch to epoch, and cut into `lanes` equal segments that are read side by side. The rest that is left over,
and the borders between sequences, therefore differ in each epoch. Lengths are counted in units: ids if documents are
concatenated, or documents if each has a row.

Memory is a few dozen bytes an extent: 150 MB for a corpus of ten million blocks of 1 MiB.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

EXTENT_BYTES = 4 << 20
"""Raw bytes of an extent. Blocks whose first raw byte lies in the same range of this length are permuted together, and
fetched together."""
ORDER_VERSION = 2
"""Version of the order, which is part of the fingerprint. It increases if the order of a run's bytes ever changes."""
BLOCKS_AT_ONCE = 1 << 17
"""Blocks whose columns fit into a processor's cache."""
OPENING = np.array([1 << 63], np.uint64)
"""Sentinel key for the place where an epoch's ring is opened. No extent has this number."""
EPOCHS_KEPT = 2
"""Permutations in memory. A loader reads ahead across one border of epochs at most."""


class Piece(NamedTuple):
    """Range of one block, in units."""

    block: int
    """Number of the block."""
    start: int
    """First unit."""
    length: int
    """Number of units."""
    last_of_extent: int
    """Last block of the extent: blocks up to it are read next."""


class Run(NamedTuple):
    """Sequences that follow each other in an epoch, evenly spaced among the requested ones."""

    epoch: int
    """Number of the epoch."""
    start: int
    """Start of the first sequence, in units of the epoch."""
    rows: slice
    """Positions among the requested sequences."""


@dataclass(frozen=True)
class _Epoch:
    extents: NDArray[np.int32]
    """Extents in this epoch's order."""
    starts: NDArray[np.int64]
    """(extents + 1,) start of each extent on the ring, in units, and the end of the last."""
    opened_at: int
    """Place on the ring where the epoch begins."""


class Order:
    """Place of each sequence of a run. It is a pure function of its arguments. Many threads may use it at once.

    Args:
        raw_bytes: (blocks,) raw bytes of each block; they make the extents.
        units_of: function that returns the units of blocks first … last - 1: (last - first,) integers.
        sequence_length: units of a sequence.
        lanes: largest number of lanes; there are fewer if there are fewer sequences.
        seed: seed of the permutations.
    """

    def __init__(
        self,
        raw_bytes: NDArray[np.uint32],
        units_of: Callable[[int, int], NDArray[np.int64]],
        sequence_length: int,
        lanes: int,
        seed: int,
    ) -> None:
        self.sequence_length = sequence_length
        self._seed = seed
        self._units_of = units_of
        self._first_blocks, before = _extents(raw_bytes, units_of)
        self._lengths = np.diff(before)
        self.units = int(before[-1])
        sequences = self.units // sequence_length
        self.lanes = max(1, min(lanes, sequences))
        self.sequences_per_lane = sequences // self.lanes
        self.sequences_per_epoch = self.sequences_per_lane * self.lanes
        self._epochs: dict[int, _Epoch] = {}  # replaced, never changed, so it is read without the lock
        self._lock = threading.Lock()
        self._blocks_of = lru_cache(maxsize=4 * self.lanes)(self._blocks_of_uncached)

    def locate(self, sequence: int) -> list[Piece]:
        """Return the pieces of a sequence."""
        epoch, k = divmod(sequence, self.sequences_per_epoch)
        lane, position = k % self.lanes, k // self.lanes
        start = (lane * self.sequences_per_lane + position) * self.sequence_length
        return list(self.pieces(epoch, start, start + self.sequence_length))

    def runs(self, sequences: NDArray[np.int64]) -> Iterator[Run]:
        """Yield sequences, grouped into runs."""
        if not len(sequences):
            return
        epochs, k = np.divmod(sequences, self.sequences_per_epoch)
        positions, lanes = np.divmod(k, self.lanes)
        within = lanes * self.sequences_per_lane + positions
        rows = np.lexsort((within, epochs))
        epochs, within = epochs[rows], within[rows]
        steps = np.diff(rows)
        follows = (np.diff(within) == 1) & (np.diff(epochs) == 0) & (steps > 0)
        follows[1:] &= (steps[1:] == steps[:-1]) | ~follows[:-1]
        first = np.flatnonzero(np.concatenate([[True], ~follows]))
        counts = np.diff(first, append=len(rows))
        spacing = np.where(counts > 1, np.append(steps, 1)[first], 1)
        starts = within[first] * self.sequence_length
        columns = (epochs[first], starts, rows[first], spacing, counts)
        for epoch, start, row, step, count in zip(*(column.tolist() for column in columns), strict=True):
            yield Run(epoch, start, slice(row, row + (count - 1) * step + 1, step))

    def pieces(self, epoch: int, start: int, stop: int) -> Iterator[Piece]:
        """Yield the pieces of units start … stop - 1 of an epoch."""
        permuted = self._epochs.get(epoch) or self._permuted(epoch)
        start, stop = start + permuted.opened_at, stop + permuted.opened_at
        if stop > self.units:  # beyond the end of the corpus the ring begins again
            if start < self.units:
                yield from self._pieces(permuted, start, self.units)
            start, stop = max(0, start - self.units), stop - self.units
        yield from self._pieces(permuted, start, stop)

    def _pieces(self, permuted: _Epoch, start: int, stop: int) -> Iterator[Piece]:
        slot = int(permuted.starts.searchsorted(start, "right")) - 1
        begin = permuted.starts.item(slot)
        while start < stop:
            first, ends = self._blocks_of(permuted.extents.item(slot))
            last_of_extent = first + len(ends) - 1
            index = bisect_right(ends, start - begin)
            while start < stop and index < len(ends):
                end = begin + ends[index]
                block_begin = begin + ends[index - 1] if index else begin
                part = (end if end < stop else stop) - start
                if part:
                    yield Piece(first + index, start - block_begin, part, last_of_extent)
                start += part
                index += 1
            begin += ends[-1]
            slot += 1

    def _blocks_of_uncached(self, extent: int) -> tuple[int, list[int]]:
        """Return the first block of an extent, and where each of its blocks ends in it."""
        first, last = self._first_blocks.item(extent), self._first_blocks.item(extent + 1)
        return first, list(accumulate(self._units_of(first, last).tolist()))

    def _permuted(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._epochs:
                extents = permutation(len(self._lengths), self._seed, number).astype(np.int32)
                starts = np.zeros(len(extents) + 1, np.int64)
                np.cumsum(self._lengths[extents], out=starts[1:])
                opened_at = int(_key(self._seed, number, OPENING)[0]) % self.units
                kept = sorted(self._epochs)[1 - EPOCHS_KEPT :] if len(self._epochs) >= EPOCHS_KEPT else self._epochs
                self._epochs = {
                    **{epoch: self._epochs[epoch] for epoch in kept},
                    number: _Epoch(extents, starts, opened_at),
                }
            return self._epochs[number]


def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of `count` things in an epoch: the argsort of SplitMix64 of their numbers.

    No library's random generator is used, so no upgrade can reorder a run. A golden test pins the result.
    """
    return np.argsort(_key(seed, epoch, np.arange(count, dtype=np.uint64)), kind="stable")


def _key(seed: int, epoch: int, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the random number of each thing in an epoch."""
    base = _splitmix64(_splitmix64(np.array([seed], np.uint64)) + np.uint64(epoch))
    return _splitmix64(base + numbers)


def _splitmix64(state: NDArray[Any]) -> NDArray[np.uint64]:
    """Apply SplitMix64's output function (Steele, Lea and Flood 2014) to uint64 in place, elementwise, modulo 2**64."""
    state += np.uint64(0x9E3779B97F4A7C15)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state


def _extents(
    raw_bytes: NDArray[np.uint32], units_of: Callable[[int, int], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first block of each extent, and the units before it; both have one element more than extents.

    Extents depend on raw bytes alone. The borders of shards, which preparation chooses, have no effect.
    """
    first_blocks, units_before = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    bytes_done, units_done, extent = 0, 0, -1
    for first in range(0, len(raw_bytes), BLOCKS_AT_ONCE):
        raw = raw_bytes[first : first + BLOCKS_AT_ONCE].astype(np.int64)
        units = units_of(first, first + len(raw))
        extents = (bytes_done + np.cumsum(raw) - raw) // EXTENT_BYTES
        begins = np.flatnonzero(np.diff(extents, prepend=extent))
        first_blocks.append(first + begins)
        units_before.append((units_done + np.cumsum(units) - units)[begins])
        bytes_done += int(raw.sum())
        units_done += int(units.sum())
        extent = extents[-1]
    return np.concatenate([*first_blocks, [len(raw_bytes)]]), np.concatenate([*units_before, [units_done]])
