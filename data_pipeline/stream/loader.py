"""The loader: one rank's micro-batches of each global batch, read ahead by threads.

    global batch      sequences g … g + global_batch - 1
    micro-batch i     the i-th group of `micro_batch` of them (the last may be shorter)
    rank r of W       micro-batches r, r + W, r + 2W, …
    window            several micro-batches of a rank, read at once by one thread

A lane is read in stretches, since a window asks for several of its sequences. Windows begin small, so the first batch
comes soon, and grow. Threads, not processes: decompression and copying release the interpreter lock, and nothing is
left behind when the run is killed.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from data_pipeline.stream.dealing import deal
from data_pipeline.stream.rows import DIGEST_MODULUS, Ids, Rows

WINDOW = 32 << 20
"""Ids of a window, unless one micro-batch has more."""
PATIENCE = 0.5
"""Seconds between two looks at whether what is waited for is still wanted."""


class LoaderConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How one process reads ahead. Memory, beside the blocks that lanes are in: for each thread and two more, a window
    of 32 MiB, as much again while a mixture's is read or where there is padding; and `prefetch` micro-batches."""

    threads: int = Field(default=2, ge=1, le=1024)
    """Threads that read and decompress."""
    prefetch: int = Field(default=8, ge=1)
    """Micro-batches read ahead of the training step, at least."""


class Stream(Protocol):
    """What a loader reads from: a ByteStream or a Mixture."""

    sequence_length: int

    def read_groups(self, groups: Sequence[NDArray[np.int64]]) -> list[Rows]: ...


@dataclass(frozen=True)
class MicroBatch:
    index: int
    """Its number in the global batch, the same on any number of ranks."""
    rows: Rows
    """In the form that is moved to a device."""
    targets: NDArray[np.bool_]
    """(rows, T): which positions count in the loss. Not to be written to: micro-batches share it."""
    digest: int = 0
    """Rows.digest of its rows; 0 unless the loader was asked for it."""

    @property
    def ids(self) -> Ids:
        """(rows, T) int16: bytes 0..255, 256 between documents, 257 padding."""
        return self.rows.ids


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch."""

    micro_batches: list[MicroBatch]
    next_sequence: int
    """The data state after this batch: the first sequence number of the next one."""

    @property
    def masked(self) -> int:
        """Positions that are no targets: holes, and padding."""
        return sum(m.targets.size - int(np.count_nonzero(m.targets)) for m in self.micro_batches)

    @property
    def digest(self) -> int:
        return sum(m.digest for m in self.micro_batches) % DIGEST_MODULUS


class Loader:
    """Iterates over batches for ever, from sequence number `first_sequence` on.

    Args:
        global_batch: sequences of one optimizer step, over all ranks.
        micro_batch: sequences of one forward pass.
        digest: have each micro-batch carry the digest of its rows.
        give_up: asked while a window is waited for; True ends the iteration.
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
        self._first_sequence = first_sequence
        self._digest = digest
        self._give_up = give_up
        self._my_micro_batches = deal(global_batch, micro_batch, rank, world_size)
        self._largest_window = max(1, WINDOW // stream.sequence_length // micro_batch)
        self._every_position = np.ones((micro_batch, stream.sequence_length), np.bool_)
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="loader")

    def __iter__(self) -> Iterator[Batch]:
        micro_batches = self._read_ahead()
        for g in self._batch_starts():
            mine = list(islice(micro_batches, len(self._my_micro_batches)))
            if len(mine) < len(self._my_micro_batches):
                return
            yield Batch(mine, g + self._global_batch)

    def _batch_starts(self) -> Iterator[int]:
        g = self._first_sequence
        while True:
            yield g
            g += self._global_batch

    def _read_ahead(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches for ever."""
        wanted = ((g, index) for g in self._batch_starts() for index in self._my_micro_batches)
        ahead: deque[Future[list[MicroBatch]]] = deque()
        unread, size = 0, 1  # micro-batches read ahead; of the next window
        while True:
            while len(ahead) <= self._config.threads or unread <= self._config.prefetch:
                ahead.append(self._pool.submit(self._read_window, list(islice(wanted, size))))
                unread += size
                size = min(2 * size, self._largest_window)
            window = ahead.popleft()
            while not window.done():
                if self._give_up():
                    return
                wait([window], timeout=PATIENCE)
            unread -= len(window.result())
            yield from window.result()

    def _read_window(self, wanted: list[tuple[int, int]]) -> list[MicroBatch]:
        groups = [self._sequences(g, index) for g, index in wanted]
        return [
            self._micro_batch_of(index, sequences, rows)
            for (_, index), sequences, rows in zip(wanted, groups, self._stream.read_groups(groups), strict=True)
        ]

    def _micro_batch_of(self, index: int, sequences: NDArray[np.int64], rows: Rows) -> MicroBatch:
        targets = self._every_position[: len(sequences)] if rows.padding is None else ~rows.padding
        return MicroBatch(index, rows, targets, rows.digest(sequences.tolist()) if self._digest else 0)

    def _sequences(self, g: int, index: int) -> NDArray[np.int64]:
        rows = self._my_micro_batches[index]
        return np.arange(g + rows.start, g + rows.stop, dtype=np.int64)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
