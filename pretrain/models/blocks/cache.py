"""Cache of a layer's keys and values, for decoding."""

from torch import Tensor

SMALLEST_CACHE = 16
"""Positions that a new cache has room for, at least."""


class LayerCache:
    """Keys and values of one layer for the positions decoded so far: (rows, heads, kept, width / heads) each.

    A full buffer is replaced by one with room for twice the positions, so a new position rarely copies the others.
    """

    def __init__(self, limit: int | None = None) -> None:
        """Make an empty cache.

        Args:
            limit: positions kept between two calls of `append`; None keeps all.
        """
        self.limit = limit
        self.length = 0
        """Positions appended so far, kept or not."""
        self._buffer: Tensor | None = None
        """(2, rows, heads, room, width / heads)"""
        self._span = slice(0, 0)
        """Kept positions in the buffer."""

    @property
    def kept(self) -> int:
        """Number of kept positions."""
        return self._span.stop - self._span.start

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append positions, and return the keys and values of the kept positions followed by these.

        The result is a view of the buffer; do not write to it.

        Args:
            keys: (rows, heads, n, width / heads)
            values: (rows, heads, n, width / heads)

        Returns:
            (rows, heads, kept + n, width / heads) twice.
        """
        kept, count = self.kept, keys.shape[2]
        if self._buffer is None or self._span.stop + count > self._buffer.shape[3]:
            room = max(2 * (kept + count), SMALLEST_CACHE)
            buffer = keys.new_empty(2, *keys.shape[:2], room, keys.shape[3])
            if self._buffer is not None:
                buffer[:, :, :, :kept] = self._buffer[:, :, :, self._span]
            self._buffer, self._span = buffer, slice(0, kept)
        last = self._span.stop
        self._buffer[0, :, :, last : last + count] = keys
        self._buffer[1, :, :, last : last + count] = values
        self._span = slice(self._span.start, last + count)
        all_keys, all_values = self._buffer[:, :, :, self._span]
        self.length += count
        if self.limit is not None:
            self.keep_last(self.limit)
        return all_keys, all_values

    def keep_last(self, count: int) -> None:
        """Drop all but the last `count` kept positions."""
        self._span = slice(max(self._span.stop - count, self._span.start), self._span.stop)

    def rewind(self, count: int) -> None:
        """Take back the last `count` positions of the last call of `append`. The positions kept before it return."""
        stop = self._span.stop - count
        start = self._span.start if self.limit is None else max(stop - self.limit, 0)
        self._span, self.length = slice(start, stop), self.length - count

    def select(self, rows: Tensor) -> None:
        """Replace the rows by some of them, which may repeat.

        Args:
            rows: (n,) numbers of rows.
        """
        if self._buffer is not None:
            self._buffer = self._buffer[:, rows]

    def clear(self) -> None:
        """Drop all positions, and count from 0 again."""
        self.length = 0
        self._span = slice(0, 0)
