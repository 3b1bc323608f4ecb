"""The loader: one rank's micro-batches of each global batch, read ahead by threads.

    global batch      the first global_batch sequences from g on that are not skipped
    micro-batch i     the i-th group of `micro_batch` of them (the last may be shorter)
    rank r of W       micro-batches r, r + W, r + 2W, …
    window            several micro-batches of a rank, read at once by one thread

A window requests several sequences of a lane, so a lane is read in long ranges. Windows begin small, which makes the
first batch ready soon, and grow. The loader uses threads, not processes: decompression and copying release the
interpreter lock, and a killed run leaves nothing behind.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from data_pipeline.errors import CorpusError
from data_pipeline.stream.dealing import deal
from data_pipeline.stream.rows import DIGEST_MODULUS, Example, Ids, Rows
from data_pipeline.stream.skips import Skips

WINDOW = 32 << 20
"""Largest number of ids of a window, unless one micro-batch has more."""
GIVE_UP_SECONDS = 0.5
"""Seconds between two checks whether a window is still needed."""


ShowRows = Callable[[Rows, NDArray[np.int64]], Example]
"""Function that shows rows to a model, given their sequence numbers."""


class LoaderConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Prefetching of micro-batches in one process.

    Memory, besides the blocks that lanes read: for each thread, and for two more, a window of 32 MiB; the same again
    while a mixture is read or if there is padding; and `prefetch` micro-batches.
    """

    threads: int = Field(default=2, ge=1, le=1024)
    """Threads that read and decompress."""
    prefetch: int = Field(default=8, ge=1)
    """Smallest number of micro-batches that are read ahead of the training step."""


class Stream(Protocol):
    """Source of a loader's sequences: a ByteStream or a Mixture."""

    sequence_length: int
    """Ids of a sequence."""

    def read_groups(self, groups: Sequence[NDArray[np.int64]]) -> list[Rows]:
        """Return groups of sequences, given their numbers."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass."""

    index: int
    """Number in the global batch. It is the same on any number of ranks."""
    rows: Rows
    """Rows in the form that is moved to a device."""
    targets: NDArray[np.bool_]
    """(rows, n): whether an id counts in the loss. Micro-batches share this array, so do not write to it."""
    digest: int = 0
    """Rows.digest of the rows; 0 unless the loader computes digests."""
    first_sequence: int = 0
    """Sequence number of the first row; those of the others follow, except skipped ones."""
    example: Example | None = None
    """The rows as the objective shows them; None if they are predicted as they are."""

    @property
    def ids(self) -> Ids:
        """(rows, n) int16 ids that are predicted: bytes 0..255, 256 between documents, 257 padding."""
        return self.rows.ids if self.example is None else self.example.ids


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch."""

    micro_batches: list[MicroBatch]
    next_sequence: int
    """Data state after this batch: the first sequence number of the next one."""

    @property
    def masked(self) -> int:
        """Number of padding ids of the rows, holes among them."""
        return sum(int(np.count_nonzero(m.rows.padding)) for m in self.micro_batches if m.rows.padding is not None)

    @property
    def digest(self) -> int:
        """Sum of the digests of the micro-batches."""
        return sum(m.digest for m in self.micro_batches) % DIGEST_MODULUS


class Loader:
    """Iterator of batches, from sequence number `first_sequence` on, without end unless `until` sets one.

    Args:
        stream: source of the sequences.
        config: how to read ahead.
        global_batch: sequences of one optimizer step, over all ranks.
        micro_batch: sequences of one forward pass.
        first_sequence: number of the first sequence.
        rank: this rank.
        world_size: number of ranks.
        digest: compute the digest of the rows of each micro-batch.
        give_up: called while a window is read; True ends the iteration.
    """

    def __init__(
        self,
        stream: Stream,
        config: LoaderConfig,
        *,
        global_batch: int,
        micro_batch: int,
        first_sequence: int = 0,
        rank: int = 0,
        world_size: int = 1,
        digest: bool = False,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stream = stream
        self._config = config
        self._global_batch = global_batch
        self._end: int | None = None
        self._skips = Skips()
        self._digest = digest
        self._give_up = give_up
        self._show: ShowRows | None = None
        self._my_micro_batches = deal(global_batch, micro_batch, rank, world_size)
        self._largest_window = max(1, WINDOW // stream.sequence_length // micro_batch)
        self._every_position = np.ones((micro_batch, stream.sequence_length), np.bool_)
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="loader")
        self._is_closed = False
        self._batches = self._batches_from(first_sequence)

    def until(self, sequence: int) -> Self:
        """Set the sequence before which batches end, and read nothing after it; return this loader. Call it first."""
        self._end = sequence
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._batches)
        except (CancelledError, RuntimeError) as error:  # no window is read any more
            if self._is_closed:
                raise CorpusError("the loader is closed") from error
            raise

    def without(self, skips: Skips) -> Self:
        """Set the sequences that no batch has; return this loader. Call it first, or before `read_again`."""
        self._skips = skips
        return self

    def showing(self, show: ShowRows | None) -> Self:
        """Set the function that shows rows as the objective does; return this loader. Call it first.

        None: they are predicted as they are.
        """
        self._show = show
        return self

    def read_again(self, first_sequence: int) -> None:
        """Drop what was read ahead, and continue from a sequence: the run has new holes, or skips sequences."""
        self._batches.close()
        self._batches = self._batches_from(first_sequence)

    def _batches_from(self, first_sequence: int) -> Generator[Batch]:
        with closing(self._read_ahead(self._batch_starts(first_sequence))) as micro_batches:
            for g in self._batch_starts(first_sequence):
                mine = list(islice(micro_batches, len(self._my_micro_batches)))
                if len(mine) < len(self._my_micro_batches):
                    return
                yield Batch(mine, self._skips.end(g, self._global_batch))

    def _batch_starts(self, first_sequence: int) -> Iterator[int]:
        g = first_sequence
        while self._end is None or g < self._end:
            yield g
            g = self._skips.end(g, self._global_batch)

    def _read_ahead(self, batch_starts: Iterable[int]) -> Generator[MicroBatch]:
        """Yield this rank's micro-batches of batches, given the first sequence of each."""
        wanted = ((g, index) for g in batch_starts for index in self._my_micro_batches)
        ahead: deque[Future[list[MicroBatch]]] = deque()
        unread, size = 0, 1  # micro-batches that are read ahead; micro-batches of the next window
        try:
            while True:
                while len(ahead) <= self._config.threads or unread <= self._config.prefetch:
                    if not (window := list(islice(wanted, size))):
                        break
                    ahead.append(self._pool.submit(self._read_window, window))
                    unread += len(window)
                    size = min(2 * size, self._largest_window)
                if not ahead:
                    return
                read = ahead.popleft()
                while not read.done():
                    if self._give_up():
                        return
                    wait([read], timeout=GIVE_UP_SECONDS)
                unread -= len(read.result())
                yield from read.result()
        finally:
            for read in ahead:
                read.cancel()

    def _read_window(self, wanted: list[tuple[int, int]]) -> list[MicroBatch]:
        groups = [self._sequences(g, index) for g, index in wanted]
        return [
            self._micro_batch_of(index, sequences, rows)
            for (_, index), sequences, rows in zip(wanted, groups, self._stream.read_groups(groups), strict=True)
        ]

    def _micro_batch_of(self, index: int, sequences: NDArray[np.int64], rows: Rows) -> MicroBatch:
        digest = rows.digest(sequences.tolist()) if self._digest else 0
        if self._show is not None:
            example = self._show(rows, sequences)
            return MicroBatch(index, rows, example.targets, digest, int(sequences[0]), example)
        targets = self._every_position[: len(sequences)] if rows.padding is None else ~rows.padding
        return MicroBatch(index, rows, targets, digest, int(sequences[0]))

    def _sequences(self, g: int, index: int) -> NDArray[np.int64]:
        rows = self._my_micro_batches[index]
        return self._skips.take(g, np.arange(rows.start, rows.stop))

    def close(self) -> None:
        """Stop reading ahead, and return at once. A window that is being read ends when its corpus is closed."""
        self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
