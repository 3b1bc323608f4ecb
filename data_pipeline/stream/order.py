"""Order of an epoch: the place of sequence number g of a run in a corpus, for any g, by arithmetic.

    epoch, k = divmod(g, sequences_per_epoch)
    lane, position = k % lanes, k // lanes         the lanes are read side by side
    stretch of the ring                            by the slices of the lane, from the place on where the lane is opened
    block                                          a binary search for the extent, another for the block in it

An epoch is the corpus as a ring of permuted extents (a few adjacent blocks each), opened at a place that differs from
epoch to epoch. The ring is cut into slices, which a permutation deals to the lanes. Each lane is read from a place
near its beginning on, and the beginning last. Rows that met in a batch therefore meet again as seldom as in a uniform
shuffle. A large corpus has one slice a lane, so that a lane reads whole blocks. A small corpus is kept in memory, where
more slices cost nothing.

Lengths are counted in units: ids if documents are concatenated, or rows if each document has its own. Memory is a few
dozen bytes an extent: 150 MB for a corpus of ten million blocks of 1 MiB.
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
ORDER_VERSION = 3
"""Version of the order of new runs, which is part of the fingerprint. It increases if the order ever changes."""
ORDER_VERSIONS = (ORDER_VERSION, 2)
"""Versions of the order that a run may have begun with, the newest first."""
SMALL_BYTES = 256 << 20
"""Raw bytes of the largest corpus that is kept in memory whole."""
SLICE_BYTES = 16 << 10
"""Smallest mean length of a slice, in raw bytes, so that a lane continues for many sequences."""
MOST_SLICES = 32
"""Largest number of slices of a lane."""
BLOCKS_AT_ONCE = 1 << 17
"""Blocks whose columns fit into a processor's cache."""
OPENING = 1 << 63
"""Sentinel key for the place where an epoch's ring is opened. No extent has this number."""
FIRST_SLICE = 1 << 62
"""Key of the first slice."""
FIRST_LANE = 1 << 61
"""Key of the place where the first lane is opened."""
EPOCHS_KEPT = 2
"""Number of permutations in memory. A loader reads ahead across at most one border of epochs."""


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
    slices: list[int]
    """Start of each slice, lane after lane, in units after `opened_at`."""
    shifts: list[int]
    """Units after its beginning where each lane is opened."""


class Order:
    """Place of each sequence of a run. It is a pure function of its arguments. Many threads may use it at once.

    Args:
        raw_bytes: (blocks,) raw bytes of each block; they make the extents.
        units_of: function that returns the units of blocks first … last - 1: (last - first,) integers.
        sequence_length: units of a sequence.
        lanes: largest number of lanes; there are fewer if there are fewer sequences.
        seed: seed of the permutations.
        version: one of ORDER_VERSIONS. Version 2 cuts the ring into lanes, and does nothing else; it leaves out the
            sequences that no whole number of rounds of the lanes reads.
    """

    def __init__(
        self,
        raw_bytes: NDArray[np.uint32],
        units_of: Callable[[int, int], NDArray[np.int64]],
        sequence_length: int,
        lanes: int,
        seed: int,
        version: int = ORDER_VERSION,
    ) -> None:
        assert version in ORDER_VERSIONS
        self.sequence_length = sequence_length
        self._seed = seed
        self._units_of = units_of
        self._first_blocks, before = _extents(raw_bytes, units_of)
        self._lengths = np.diff(before)
        self.units = int(before[-1])
        sequences = self.units // sequence_length
        self.lanes = max(1, min(lanes, sequences))
        self.sequences_per_lane = sequences // self.lanes
        self._is_shuffled = version > 2
        self._longer_lanes = sequences % self.lanes if self._is_shuffled else 0  # by one sequence; they come first
        self.sequences_per_epoch = self.sequences_per_lane * self.lanes + self._longer_lanes
        self._slices_per_lane = self._choose_slices(int(raw_bytes.sum(dtype=np.int64))) if self._is_shuffled else 1
        self._epochs: dict[int, _Epoch] = {}  # replaced, never changed, so it is read without the lock
        self._lock = threading.Lock()
        self._blocks_of = lru_cache(maxsize=4 * self.lanes)(self._blocks_of_uncached)

    def _choose_slices(self, raw_bytes: int) -> int:
        """Return the number of slices of a lane."""
        if raw_bytes > SMALL_BYTES:
            return 1
        return max(1, min(raw_bytes // (self.lanes * SLICE_BYTES), MOST_SLICES, self.sequences_per_lane))

    def locate(self, sequence: int) -> list[Piece]:
        """Return the pieces of a sequence."""
        epoch, k = divmod(sequence, self.sequences_per_epoch)
        position, lane = divmod(k, self.lanes)
        within = lane * self.sequences_per_lane + min(lane, self._longer_lanes) + position
        start = within * self.sequence_length
        return list(self.pieces(epoch, start, start + self.sequence_length))

    def runs(self, sequences: NDArray[np.int64]) -> Iterator[Run]:
        """Yield sequences, grouped into runs."""
        if not len(sequences):
            return
        epochs, k = np.divmod(sequences, self.sequences_per_epoch)
        positions, lanes = np.divmod(k, self.lanes)
        within = lanes * self.sequences_per_lane + np.minimum(lanes, self._longer_lanes) + positions
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
        """Yield the pieces of units start … stop - 1 of an epoch, whose lanes follow one another."""
        permuted = self._epochs.get(epoch) or self._permuted(epoch)
        for begin, end in self._stretches(permuted, start, stop) if self._is_shuffled else ((start, stop),):
            first, last = begin + permuted.opened_at, end + permuted.opened_at
            if last > self.units:  # beyond the end of the corpus the ring begins again
                if first < self.units:
                    yield from self._pieces(permuted, first, self.units)
                first, last = max(0, first - self.units), last - self.units
            yield from self._pieces(permuted, first, last)

    def _stretches(self, permuted: _Epoch, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield where units start … stop - 1 of an epoch lie on the ring: the start and the end of each stretch."""
        length, slices = self.sequence_length, self._slices_per_lane
        while start < stop:
            first, rows, lane = self._lane_at(start // length)
            offset = start - first * length + permuted.shifts[lane]
            if offset >= rows * length:  # at the end of the lane comes its beginning
                offset -= rows * length
            number = ((offset // length + 1) * slices - 1) // rows
            before, end = number * rows // slices * length, (number + 1) * rows // slices * length
            end = min(end, offset + stop - start, offset + (first + rows) * length - start)
            begin = permuted.slices[lane * slices + number] - before
            yield begin + offset, begin + end
            start += end - offset

    def _lane_at(self, sequence: int) -> tuple[int, int, int]:
        """Return the lane of a sequence of an epoch whose lanes follow one another.

        Returns:
            Its first sequence, its number of sequences, and its number.
        """
        rows, longer = self.sequences_per_lane, self._longer_lanes
        lane = sequence // (rows + 1)
        if lane < longer:
            return lane * (rows + 1), rows + 1, lane
        lane = (sequence - longer) // rows
        return lane * rows + longer, rows, lane

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
                opened_at = random_number(self._seed, number, OPENING) % self.units
                slices, shifts = self._deal(number) if self._is_shuffled else ([], [])
                kept = sorted(self._epochs)[1 - EPOCHS_KEPT :] if len(self._epochs) >= EPOCHS_KEPT else self._epochs
                self._epochs = {
                    **{epoch: self._epochs[epoch] for epoch in kept},
                    number: _Epoch(extents, starts, opened_at, slices, shifts),
                }
            return self._epochs[number]

    def _deal(self, epoch: int) -> tuple[list[int], list[int]]:
        """Return the start of each slice on the ring, and the units after its beginning where each lane is opened."""
        lanes, slices = np.arange(self.lanes), np.arange(self._slices_per_lane + 1)
        rows = self.sequences_per_lane + (lanes < self._longer_lanes)
        lengths = np.diff(rows[:, None] * slices // self._slices_per_lane).ravel() * self.sequence_length
        dealt = permutation(len(lengths), self._seed, epoch, FIRST_SLICE)
        starts = np.empty_like(lengths)
        starts[dealt] = np.cumsum(lengths[dealt]) - lengths[dealt]
        # A shift of up to an extent is enough: lanes that were in step by extents no longer are.
        most = np.minimum(rows, -(-self.sequences_per_epoch // len(self._lengths))).astype(np.uint64)
        shifts = _key(self._seed, epoch, np.uint64(FIRST_LANE) + lanes.astype(np.uint64)) % most
        return starts.tolist(), (shifts.astype(np.int64) * self.sequence_length).tolist()


def permutation(count: int, seed: int, epoch: int, first: int = 0) -> NDArray[np.int64]:
    """Return the order of `count` things in an epoch: the argsort of SplitMix64 of their keys, `first` and following.

    No library's random generator is used, so no upgrade can reorder a run. A golden test pins the result.
    """
    return np.argsort(_key(seed, epoch, np.uint64(first) + np.arange(count, dtype=np.uint64)), kind="stable")


def random_number(seed: int, epoch: int, number: int) -> int:
    """Return the random number of a thing in an epoch: 64 bits."""
    return int(_key(seed, epoch, np.array([number], np.uint64))[0])


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
