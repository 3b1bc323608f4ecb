"""The order of an epoch: where sequence number g of a run lies in a corpus, for any g, by arithmetic.

    epoch, k = divmod(g, sequences_per_epoch)
    lane, position = k % lanes, k // lanes
    start = (lane * sequences_per_lane + position) * sequence_length     # in the epoch
    a binary search over prefix sums finds the extent, another the block in it

An epoch is the corpus as a ring, its extents (a few adjacent blocks) permuted, opened at a place that differs from
epoch to epoch, and cut into `lanes` equal segments that are read side by side. So what is left over, and where one
sequence ends and the next begins, is another in each epoch. Lengths are counted in units: ids, where documents are
concatenated, or documents, where each has a row.

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
"""Blocks whose first raw byte lies in the same stretch of this length are permuted together, and fetched together."""
ORDER_VERSION = 2
"""Goes up if the order of a run's bytes ever changes; part of the fingerprint."""
BLOCKS_AT_ONCE = 1 << 17
"""Few enough for their columns to stay in a processor's cache."""
OPENING = np.array([1 << 63], np.uint64)
"""The thing whose random number says where an epoch's ring is opened: no extent has this number."""
EPOCHS_KEPT = 2
"""Loaders look ahead over one border at most."""


class Piece(NamedTuple):
    """A range of one block, in units."""

    block: int
    start: int
    length: int
    last_of_extent: int
    """The last block of the extent: blocks up to it are read next."""


class Run(NamedTuple):
    """Sequences that lie one after another in an epoch, evenly spaced among those asked for."""

    epoch: int
    start: int
    """Of the first, in units of the epoch."""
    rows: slice
    """Which of the sequences asked for they are."""


@dataclass(frozen=True)
class _Epoch:
    extents: NDArray[np.int32]
    """In this epoch's order."""
    starts: NDArray[np.int64]
    """Where each begins on the ring, in units; one longer."""
    opened_at: int
    """Where on the ring the epoch begins."""


class Order:
    """Where each sequence of a run lies. A pure function of what it is made of; safe from many threads.

    Args:
        raw_bytes: (blocks,) of each block: they make the extents.
        units_of: the units of blocks first … last - 1: (last - first,) integers.
        sequence_length: units of a sequence.
        lanes: at most so many; fewer when there are fewer sequences.
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
        """Where a sequence lies."""
        epoch, k = divmod(sequence, self.sequences_per_epoch)
        lane, position = k % self.lanes, k // self.lanes
        start = (lane * self.sequences_per_lane + position) * self.sequence_length
        return list(self.pieces(epoch, start, start + self.sequence_length))

    def runs(self, sequences: NDArray[np.int64]) -> Iterator[Run]:
        """Sequences, gathered into runs."""
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
        """The blocks that units start … stop - 1 of an epoch lie in."""
        permuted = self._epochs.get(epoch) or self._permuted(epoch)
        start, stop = start + permuted.opened_at, stop + permuted.opened_at
        if stop > self.units:  # past the ring's seam
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
        """The first block of an extent, and where each of its blocks ends in it."""
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
    """The order of `count` things in an epoch: the argsort of SplitMix64 of their numbers.

    Pinned by a golden test: no library's random generator is asked, so no upgrade can reorder a run.
    """
    return np.argsort(_key(seed, epoch, np.arange(count, dtype=np.uint64)), kind="stable")


def _key(seed: int, epoch: int, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The random number of each thing in an epoch."""
    base = _splitmix64(_splitmix64(np.array([seed], np.uint64)) + np.uint64(epoch))
    return _splitmix64(base + numbers)


def _splitmix64(state: NDArray[Any]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014) on uint64, elementwise, modulo 2**64, in place."""
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
    """The first block of each extent, and the units before it; both one longer than there are extents.

    Extents depend on raw bytes alone: where shards begin is a matter of preparation.
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
