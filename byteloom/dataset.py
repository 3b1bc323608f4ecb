"""The rows of a run for a training loop of one's own: a dataset of PyTorch that can be saved and resumed.

    recipe or run ─▶ Stream ─▶ steps ─▶ micro-batches of this rank ─▶ workers take them in turn ─▶ DataLoader

Items are whole micro-batches, in the order in which Byteloom trains. `DataLoader(dataset, batch_size=None)` takes items
of its workers in turn, so the items are the same for any number of workers.
"""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from os import PathLike
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from byteloom.core.errors import CorrectableError
from byteloom.stream import Stream
from data_pipeline.stream.dealing import deal
from data_pipeline.vocabulary import PADDING

WINDOW = 1 << 20
"""Largest number of ids that are read together, unless one micro-batch has more."""
IGNORED = -100
"""Label of a position that does not count, for torch's cross-entropy."""


class DatasetError(CorrectableError):
    """A dataset cannot be dealt to these ranks, or a state is not one of its own."""


class Item(TypedDict):
    """A micro-batch."""

    input_ids: Tensor
    """(rows, sequence_length) int64: bytes 0 to 255, 256 between documents, 257 for padding."""
    labels: Tensor
    """The same, with -100 at padding. A model predicts each id from those before it."""
    step: int
    """Number of the step, counted from 1."""


Place = tuple[int, int]
"""(step, number of the micro-batch among those of this rank)"""
ALONE = (0, 1)
"""Worker and number of workers of a process without workers."""


class _State(NamedTuple):
    """Place of the next item."""

    next: Place | None
    """The item's place. None: the last item was returned."""
    worker: tuple[int, int] = ALONE
    """Worker that the place belongs to, and the number of workers."""


class StreamDataset(IterableDataset[Item]):
    """Micro-batches of a run, for one rank.

    Use it with `DataLoader(dataset, batch_size=None, num_workers=2)`. torchdata's StatefulDataLoader saves and resumes
    it with the same number of workers; without workers, `state_dict` does so in any loop. `first_step` begins at a step
    with any number of workers and ranks.

    Args:
        recipe: as of `Stream`.
        micro_batch: rows of an item; None for all rows of a step that this rank has.
        rank: of this process; None: that of torch.distributed, or 0.
        world_size: number of ranks; None: that of torch.distributed, or 1.
        first_step: first step, counted from 1.
        last_step: last step; None for no end.
        overrides: as of `Stream`.

    Raises:
        DatasetError: while iterating, if the rows of a step cannot be dealt evenly to the ranks.
        ConfigError, CheckpointError, CorpusError: while iterating, as of `Stream`.
    """

    def __init__(
        self,
        recipe: str | PathLike[str],
        *,
        micro_batch: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        first_step: int = 1,
        last_step: int | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._recipe, self._overrides = recipe, overrides
        self._micro_batch = micro_batch
        self._rank = rank if rank is not None else torch.distributed.get_rank() if is_distributed else 0
        self._ranks = (
            world_size if world_size is not None else torch.distributed.get_world_size() if is_distributed else 1
        )
        if not 0 <= self._rank < self._ranks:
            raise DatasetError(f"rank is {self._rank}; it must be from 0 to {self._ranks - 1}")
        if first_step < 1 or (micro_batch is not None and micro_batch < 1):
            raise DatasetError(f"first_step is {first_step} and micro_batch {micro_batch}; both must be at least 1")
        self._last_step = last_step
        self._start = _State((first_step, 0))
        """Place of the first item of an iteration."""
        self._state = self._start

    def __iter__(self) -> Iterator[Item]:
        """Return an iterator over the items from `first_step`, or from the state that was loaded."""
        info = get_worker_info()
        worker = ALONE if info is None else (info.id, info.num_workers)
        start = self._start
        if start.worker not in (ALONE, worker):
            raise DatasetError(
                f"this state is that of worker {start.worker[0]} of {start.worker[1]}; resume with as many workers, "
                "or begin with first_step"
            )
        if start.next is None:
            return
        with Stream(self._recipe, **self._overrides) as stream:
            # Workers that share a state of the process itself take places in turn from there.
            skipped = 0 if start.worker == worker else worker[0]
            own = islice(self._places(stream, start.next), skipped, None, worker[1])
            place, size = next(own, None), 1
            while place is not None:
                window = [place, *islice(own, size - 1)]
                place = next(own, None)
                items = self._read(stream, window)
                for item, following in zip(items, [*window[1:], place], strict=True):
                    self._state = _State(following, worker)
                    yield item
                size = min(2 * size, max(1, WINDOW // items[0]["input_ids"].numel()))

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last item, as JSON values."""
        return {"next": self._state.next, "worker": self._state.worker[0], "workers": self._state.worker[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin iterations at a state of `state_dict` from here on.

        Raises:
            DatasetError: it is no such state.
        """
        try:
            found = state["next"]
            place = None if found is None else (int(found[0]), int(found[1]))
            self._start = self._state = _State(place, (int(state["worker"]), int(state["workers"])))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DatasetError(f"{state!r} is no state of a StreamDataset") from error

    def _places(self, stream: Stream, start: Place) -> Iterator[Place]:
        step, first = start
        for each in count(step):
            if self._last_step is not None and each > self._last_step:
                return
            for index in range(first, len(self._dealt(len(stream.sequences(each))))):
                yield each, index
            first = 0

    def _dealt(self, rows: int) -> list[range]:
        """Return the rows of a step that each micro-batch of this rank has."""
        micro_batch = self._micro_batch or -(-rows // self._ranks)
        if rows % (micro_batch * self._ranks):
            raise DatasetError(
                f"a step has {rows} rows, which are no whole number of micro-batches of {micro_batch} for each of "
                f"{self._ranks} ranks"
            )
        return list(deal(rows, micro_batch, self._rank, self._ranks).values())

    def _read(self, stream: Stream, places: Sequence[Place]) -> list[Item]:
        """Return the items at several places, which are read together."""
        groups = []
        for step, index in places:
            sequences = stream.sequences(step)
            rows = self._dealt(len(sequences))[index]
            groups.append(sequences[rows.start : rows.stop])
        items = list[Item]()
        for (step, _), found in zip(places, stream.read_groups(groups), strict=True):
            ids = torch.from_numpy(found.astype(np.int64))
            items.append({"input_ids": ids, "labels": ids.masked_fill(ids == PADDING, IGNORED), "step": step})
        return items
