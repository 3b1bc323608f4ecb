"""Agreement of the ranks on what they read, on faults, and on requests to stop.

Each rank reads its own rows from its own disk or network. A fault that one rank sees must end the work of all of them
at the same place, and all must read the same content.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from signal import Signals
from typing import NamedTuple, NoReturn, TypeVar

from byteloom.core.faults import FaultClass, class_for_ranks
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.withdrawn import Withdrawal
from data_pipeline.errors import CorpusError, DamagedCorpusError
from data_pipeline.stream.loader import Batch
from data_pipeline.stream.reading import Hole
from pretrain.checkpoint import NotFiniteError
from pretrain.distributed.world import World
from pretrain.training.run import TrainingError, TrainingRun
from pretrain.training.stop import Decision, StoppedError, StopRequest

VOTE_SECONDS = 1.0
"""Approximate time between two votes of the ranks."""

Item = TypeVar("Item")


class AgreedBatch(NamedTuple):
    """Batch whose parts all ranks have."""

    own: Batch
    """Part of this rank."""
    masked: int
    """Bytes masked in it, on all ranks."""
    data_seconds: list[float]
    """Seconds that each rank waited for it."""


def next_batch(run: TrainingRun) -> AgreedBatch | Decision:
    """Return the next batch; on all ranks the decision to stop once one of them is asked to.

    Raises:
        TrainingError: a rank cannot read any further, or too many blocks are damaged; on all of them.
        NotFiniteError: the last save found values that are not finite; on all of them.
    """
    while True:
        batch, fault = None, None
        try:
            run.fence.look()
            batch = None if run.stop.signal else next(run.loader, None)  # None if asked to stop while it waited
        except Exception as error:
            if run.world.size == 1:
                raise
            fault = error
        run.meter.data_is_here()
        unread = run.reading.unread(batch) if batch else []
        masked = batch.masked if batch else 0
        not_finite = run.store.not_finite
        stops, values, faults, holes, all_masked, data_seconds = zip(
            *run.world.gather_numbers(
                batch is None and fault is None,
                bool(not_finite),
                fault is not None,
                len(unread),
                masked,
                run.meter.data_seconds,
            ),
            strict=True,
        )
        if any(values):  # ranks learn it at different times
            raise NotFiniteError(next(filter(None, run.world.gather(not_finite))))
        if any(faults):
            raise_together(run.world, fault)
        if batch is None or any(stops):
            run.stop.signal = Signals(max(run.world.gather(run.stop.signal or 0)))
            return Decision.stopped_by(run.stop.signal)
        if not any(holes):
            return AgreedBatch(batch, int(sum(all_masked)) // run.recipe.engine.context, list(data_seconds))
        _skip_everywhere(run, unread)


def _skip_everywhere(run: TrainingRun, unread: list[Hole]) -> None:
    """Skip the blocks that any rank could not read for the next batch, and let the loader read that batch again.

    Raises:
        TrainingError: these are more damaged blocks than the recipe allows; on all ranks.
    """
    try:
        run.reading.skip(Hole(*hole) for of_rank in run.world.gather(unread) for hole in of_rank)
    except CorpusError as error:
        raise TrainingError(str(error)) from error
    run.loader.read_again(run.reading.record.next_sequence)


def raise_together(world: World, fault: Exception | None) -> NoReturn:
    """Raise the fault of the first rank that has one. All ranks call this once they know that a rank has one.

    Args:
        world: the ranks.
        fault: of this rank.

    Raises:
        TrainingError: always, with the same text on all ranks.
    """
    faults = world.gather([str(fault), class_for_ranks(fault)] if fault else None)
    rank = next(rank for rank, found in enumerate(faults) if found is not None)
    text, kind = faults[rank]
    error = TrainingError(f"rank {rank} of {world.size}: {text}")
    error.fault = kind and FaultClass(kind)
    raise error from fault


def agree_on_corpora(corpora: Sequence[Corpus], world: World) -> None:
    """Check that all ranks have the same corpora, and give all of them rank 0's lists of withdrawn documents.

    A list may grow at any time, so only rank 0 reads it.

    Args:
        corpora: corpora that this rank has opened.
        world: the ranks.

    Raises:
        DamagedCorpusError: a rank has another corpus.
        CorpusError: on rank 0, a list cannot be read; a WorldError on the others.
    """
    by_rank = world.gather([corpus.content_sha256 for corpus in corpora])
    for rank, contents in enumerate(by_rank):
        for corpus, content, of_first in zip(corpora, contents, by_rank[0], strict=True):
            if content != of_first:
                raise DamagedCorpusError(
                    f"{corpus.location} is another corpus on rank {rank} than on rank 0: content sha256 {content}, "
                    f"and {of_first}; give all machines the same corpus"
                )
    lists = world.on_first(lambda: [corpus.withdrawn for corpus in corpora])
    for corpus, entries in zip(corpora, lists, strict=True):
        corpus.withdrawn = [Withdrawal(*entry) for entry in entries]


class Vote:
    """Vote of the ranks in a loop that every rank repeats equally often: stop requests, and faults of reading.

    The ranks exchange about once a second. The number of items between two exchanges follows from the time that the
    slowest rank took for the items before, so it is the same on all ranks.

    Args:
        stop: of this rank.
        world: ranks that vote.
    """

    def __init__(self, stop: StopRequest, world: World) -> None:
        self._stop, self._world = stop, world
        self._items = 1
        self._last = time.monotonic()

    def agreed(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield items. Each rank has equally many. They are read before the ranks vote on using them.

        Raises:
            StoppedError: a rank was asked to stop; on all ranks.
            TrainingError: a rank cannot read its items; on all ranks.
        """
        while True:
            ahead, fault = list[Item](), None
            try:
                ahead = list(islice(items, self._items))
            except Exception as error:
                if self._world.size == 1:
                    raise
                fault = error
            self._exchange(fault)
            if not ahead:
                return
            yield from ahead

    def _exchange(self, fault: Exception | None) -> None:
        now = time.monotonic()
        asked, faults, seconds = zip(
            *self._world.gather_numbers(self._stop.signal or 0, fault is not None, now - self._last), strict=True
        )
        self._last = now
        if any(faults):
            raise_together(self._world, fault)
        if any(asked):
            self._stop.signal = Signals(int(max(asked)))
            raise StoppedError(self._stop.signal)
        if self._world.size > 1:
            self._items = max(1, min(2 * self._items, int(self._items * VOTE_SECONDS / max(*seconds, 1e-9))))
