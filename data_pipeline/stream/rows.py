"""Rows: training sequences as bytes, from a block's content to the device.

    contents of blocks ─▶ Window.put, one copy a range ─▶ Window.in_groups ─▶ Rows, one for each micro-batch

Most ids are bytes, so rows are stored as bytes. Separators and padding, which are no bytes, are stored as positions.
The model's side widens the bytes to ids, on the device if there is one.
"""

import struct
import weakref
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import blake3
import numpy as np
from numpy.typing import NDArray

from data_pipeline.corpus.entropies import Entropies
from data_pipeline.vocabulary import PADDING, SEPARATOR

Ids = NDArray[np.int16]
Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]

DIGEST_MODULUS = 1 << 256
REUSED_BYTES = 4 << 20
"""Size from which memory is used again. Smaller arrays come from NumPy's allocator."""
_TAIL = struct.Struct("<IIQ")


class Rows(NamedTuple):
    """Rows of T ids."""

    bytes: Bytes
    """(rows, T), each row contiguous; 0 for an id that is no byte."""
    separators: Places
    """Positions of SEPARATOR in the flattened rows, ascending."""
    padding: NDArray[np.bool_] | None
    """(rows, T): whether an id is PADDING; None if there is no padding."""
    entropies: Entropies | None = None
    """(rows, T) entropies of the predictions of the ids, in nats, 0 at padding; None if they are not read."""

    @property
    def ids(self) -> Ids:
        """(rows, T) int16: bytes 0..255, SEPARATOR, PADDING."""
        ids = self.bytes.astype(np.int16, order="C")
        ids.reshape(-1)[self.separators] = SEPARATOR
        if self.padding is not None:
            ids[self.padding] = PADDING
        return ids

    def digest(self, sequences: Iterable[int]) -> int:
        """Return the sum of the rows' digests modulo 2**256. It is the same in any order, on any number of ranks.

        The digest of a row is BLAKE3 of: its bytes, the positions of its separators, those of its padding, the number
        of each (4 bytes each, little-endian), and the row's sequence number (8 bytes).

        Args:
            sequences: sequence number of each row.
        """
        separators, separator_bounds = _by_row(self.separators, self.bytes.shape)
        padded = np.flatnonzero(self.padding) if self.padding is not None else np.empty(0, np.int64)
        padding, padding_bounds = _by_row(padded, self.bytes.shape)
        total = begin = padded_begin = 0
        digest = blake3.blake3()
        for sequence, row, end, padded_end in zip(sequences, self.bytes, separator_bounds, padding_bounds, strict=True):
            tail = _TAIL.pack(end - begin, padded_end - padded_begin, sequence)
            digest.reset()  # a new object for each row takes longer than a KiB of it
            digest.update(row)
            digest.update(separators[4 * begin : 4 * end] + padding[4 * padded_begin : 4 * padded_end] + tail)
            total += int.from_bytes(digest.digest(), "little")
            begin, padded_begin = end, padded_end
        return total % DIGEST_MODULUS


class Example(NamedTuple):
    """Rows as an objective shows them to a model."""

    ids: Ids
    """(rows, n) ids that are predicted."""
    targets: NDArray[np.bool_]
    """(rows, n): whether an id counts in the loss."""
    given: Ids | NDArray[np.int64] | Entropies | None
    """(rows, m) ids that the model reads besides, or (rows,) lengths of prefixes, or (rows, n) entropies; None if it
    reads `ids` alone."""


def _by_row(places: Places, shape: tuple[int, ...]) -> tuple[bytes, list[int]]:
    """Return positions of flattened rows as positions in their row, 4 bytes each, and where each row ends in them."""
    rows, length = shape
    ends = places.searchsorted(np.arange(1, rows + 1) * length)
    return (places % length).astype("<u4").tobytes(), ends.tolist()


class Memory:
    """Arrays whose memory is used again when nothing refers to them any more.

    The system clears new memory first, which costs as much as writing rows to it.
    """

    def __init__(self) -> None:
        self._free = list[NDArray[np.uint8]]()  # arrays of one size; a list's append and pop need no lock

    def take(self, size: int) -> Bytes:
        """Return an array of a size, with undefined content."""
        if size < REUSED_BYTES:
            return np.empty(size, np.uint8)
        memory = np.empty(0, np.uint8)
        while self._free and len(memory) != size:
            memory = self._free.pop()
        if len(memory) != size:
            memory = np.empty(size, np.uint8)
        # A view of a view refers to the innermost array. A view of a memoryview stops this, so `array` lives as long as
        # its views.
        array = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array


class Window:
    """Memory of many rows while they are read, in the order of their slots, which is the order of reading.

    Slots that follow each other in a lane are contiguous in memory.

    Args:
        rows: number of rows.
        length: ids of a row.
        memory: memory to take.
        has_entropies: whether there is a place for entropies too.
    """

    def __init__(self, rows: int, length: int, memory: Memory, *, has_entropies: bool = False) -> None:
        self._bytes = memory.take(rows * length)
        self._entropies: Entropies | None = np.zeros(rows * length, np.float16) if has_entropies else None
        self._length = length
        self._separators = list[Places]()
        self._padding: NDArray[np.bool_] | None = None

    def put(self, place: int, content: Bytes) -> None:
        """Write content from a place on."""
        self._bytes[place : place + len(content)] = content

    def put_entropies(self, place: int, entropies: Entropies) -> None:
        """Write the entropies of content from a place on."""
        assert self._entropies is not None
        self._entropies[place : place + len(entropies)] = entropies

    def separate(self, places: Places) -> None:
        """Add the places of SEPARATOR. Padding takes precedence."""
        self._separators.append(places)

    def pad(self, start: int, stop: int) -> None:
        """Turn the range from one place to another into padding."""
        if start < stop:
            if self._padding is None:
                self._padding = np.zeros(len(self._bytes), np.bool_)
            self._padding[start:stop] = True
            self._bytes[start:stop] = 0
            if self._entropies is not None:
                self._entropies[start:stop] = 0

    def in_groups(self, slots: NDArray[np.int64], sizes: Sequence[int]) -> list[Rows]:
        """Return the rows in groups. A group whose slots are evenly spaced shares memory with the window.

        Args:
            slots: slot of each row, group after group.
            sizes: number of rows of each group.
        """
        length = self._length
        separators = np.concatenate([np.empty(0, np.int64), *self._separators])
        if self._padding is not None:
            separators = separators[~self._padding[separators]]
        row_of_slot = np.empty_like(slots)
        row_of_slot[slots] = np.arange(len(slots))
        slot, column = np.divmod(separators, length)
        separators = np.sort(row_of_slot[slot] * length + column)
        starts = np.cumsum([0, *sizes])
        bounds = separators.searchsorted(starts * length)
        separators -= np.repeat(starts[:-1] * length, np.diff(bounds))
        numbers, starts, bounds = slots.tolist(), starts.tolist(), bounds.tolist()
        rows = self._bytes.reshape(-1, length)
        padding = None if self._padding is None else self._padding.reshape(-1, length)
        entropies = None if self._entropies is None else self._entropies.reshape(-1, length)
        groups = []
        for (start, stop), (first, last) in zip(pairwise(starts), pairwise(bounds), strict=True):
            own = _as_index(numbers[start:stop])
            padded = None if padding is None else padding[own]
            if padded is not None and not padded.any():
                padded = None
            own_entropies = None if entropies is None else entropies[own]
            groups.append(Rows(rows[own], separators[first:last], padded, own_entropies))
        return groups


def _as_index(slots: list[int]) -> slice | list[int]:
    """Return an index for these rows of an array: a slice, which copies nothing, if they are evenly spaced."""
    if not slots:
        return slice(0)
    step = slots[1] - slots[0] if len(slots) > 1 else 1
    evenly = step > 0 and slots == list(range(slots[0], slots[-1] + 1, step))
    return slice(slots[0], slots[-1] + 1, step) if evenly else slots


def interleave(parts: Sequence[tuple[NDArray[np.intp], Rows]]) -> Rows:
    """Return the rows of several parts, interleaved.

    Args:
        parts: each part with the positions of its rows among all.
    """
    length = parts[0][1].bytes.shape[1]
    count = sum(len(rows) for rows, _ in parts)
    joined = np.empty((count, length), np.uint8)
    separators = []
    padding = None
    entropies = None if parts[0][1].entropies is None else np.zeros((count, length), np.float16)
    for rows, part in parts:
        joined[rows] = part.bytes
        if entropies is not None:
            entropies[rows] = part.entropies
        row, column = np.divmod(part.separators, length)
        separators.append(rows[row] * length + column)
        if part.padding is not None:
            padding = np.zeros((count, length), np.bool_) if padding is None else padding
            padding[rows] = part.padding
    return Rows(joined, np.sort(np.concatenate(separators)), padding, entropies)
