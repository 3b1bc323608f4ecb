"""The loader: one rank's micro-batches of each global batch, read ahead by threads.

    global batch      sequences g … g + global_batch - 1
    micro-batch i     the i-th group of `micro_batch` of them (the last may be shorter)
    rank r of W       micro-batches r, r + W, r + 2W, …

Threads, not processes: decompression and slicing release the interpreter lock, and nothing is left behind when the run
is killed.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from data_pipeline.stream import ByteStream, Ids
from data_pipeline.vocabulary import PADDING


class LoaderConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How one process reads ahead."""

    threads: int = Field(default=2, ge=1)
    """Threads that read and decompress."""
    prefetch: int = Field(default=8, ge=1)
    """Micro-batches read ahead of the training step."""


@dataclass(frozen=True)
class MicroBatch:
    index: int
    """Its number in the global batch, the same on any number of ranks."""
    ids: Ids
    """(rows, T) int16: bytes 0..255, 256 between documents, 257 padding."""
    targets: NDArray[np.bool_]
    """(rows, T): which positions count in the loss."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch."""

    micro_batches: list[MicroBatch]
    next_sequence: int
    """The data state after this batch: the first sequence number of the next one."""

    @property
    def masked(self) -> int:
        """Positions that are no targets: holes, and padding."""
        return sum(int(np.count_nonzero(~m.targets)) for m in self.micro_batches)


class Loader:
    """Iterates over batches for ever, from sequence number `first_sequence` on.

    Args:
        global_batch: sequences of one optimizer step, over all ranks.
        micro_batch: sequences of one forward pass.
    """

    def __init__(
        self,
        stream: ByteStream,
        config: LoaderConfig,
        *,
        global_batch: int,
        micro_batch: int,
        first_sequence: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._stream = stream
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._prefetch = config.prefetch
        self._first_sequence = first_sequence
        self._my_micro_batches = range(rank, -(-global_batch // micro_batch), world_size)
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="loader")

    def __iter__(self) -> Iterator[Batch]:
        if not self._my_micro_batches:
            yield from (Batch([], g + self._global_batch) for g in self._batch_starts())
        ahead: deque[Future[MicroBatch]] = deque()
        reads = ((g, index) for g in self._batch_starts() for index in self._my_micro_batches)
        for g in self._batch_starts():
            micro_batches = []
            for _ in self._my_micro_batches:
                while len(ahead) <= self._prefetch:
                    ahead.append(self._pool.submit(self._read, *next(reads)))
                micro_batches.append(ahead.popleft().result())
            yield Batch(micro_batches, g + self._global_batch)

    def _batch_starts(self) -> Iterator[int]:
        g = self._first_sequence
        while True:
            yield g
            g += self._global_batch

    def _read(self, g: int, index: int) -> MicroBatch:
        first = index * self._micro_batch
        rows = range(first, min(first + self._micro_batch, self._global_batch))
        ids = np.stack([self._stream[g + row] for row in rows])
        return MicroBatch(index, ids, ids != PADDING)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
