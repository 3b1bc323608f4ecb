"""Agreement of the ranks on what they read, on faults, and on requests to stop.

Each rank reads its own rows from its own disk or network. A fault that one rank sees must end the work of all of them
at the same place, and all must read the same content.

    step n      ─▶ numbers of step n, and each rank's vote on the batch of step n + 1: one exchange
    step n + 1  ─▶ numbers of step n + 1, and …

A vote has an exchange of its own before the first step of a start, after a batch that is skipped, and where blocks are
damaged.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from signal import Signals
from typing import NamedTuple, NoReturn, TypeVar, cast

from byteloom.core.errors import CorrectableError
from byteloom.core.faults import FaultClass, class_for_ranks
from byteloom.core.torch_compat import annotate
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.withdrawn import Withdrawal
from data_pipeline.errors import CorpusError, DamagedCorpusError
from data_pipeline.stream.loader import Batch
from data_pipeline.stream.reading import Hole
from pretrain.checkpoint import NotFiniteError
from pretrain.distributed.world import World
from pretrain.engines import StepResult, Upcoming
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
    """Seconds that each rank waited for it since the step began."""


class _Ballot(NamedTuple):
    """A rank's vote on its next batch."""

    batch: Batch | None
    """None if it has none: it was asked to stop, or cannot read any further."""
    fault: Exception | None
    unread: list[Hole]
    not_finite: str
    """What the last save found; empty if all values are finite."""
    data_seconds: float

    @property
    def numbers(self) -> tuple[float, ...]:
        """Return what the ranks exchange."""
        return (
            self.batch is None and self.fault is None,
            bool(self.not_finite),
            self.fault is not None,
            len(self.unread),
            self.batch.masked if self.batch else 0,
            self.data_seconds,
        )


class AgreedBatches:
    """Batches of a start, one after another, that all ranks have."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._cast: _Ballot | None = None
        """This rank's vote on the next batch, until the ranks have exchanged it."""
        self._ahead: tuple[_Ballot, Sequence[Sequence[float]]] | None = None
        """The same, and the votes of all ranks, by rank."""

    def look_ahead(self) -> Upcoming:
        """Read the batch of the next step during the current one, and vote on it. It raises nothing: `next` does."""
        self._cast = self._vote()
        batch = self._cast.batch
        return Upcoming(batch.micro_batches if batch else [], self._cast.numbers)

    def heard(self, result: StepResult) -> None:
        """Keep the votes that came with a step's numbers. Without this, the next batch is read and voted on again."""
        assert self._cast is not None
        self._ahead = self._cast, result.upcoming

    def next(self) -> AgreedBatch | Decision:
        """Return the next batch; on all ranks the decision to stop once one of them is asked to.

        Raises:
            TrainingError: a rank cannot read any further, or too many blocks are damaged; on all of them.
            NotFiniteError: the last save found values that are not finite; on all of them.
        """
        run, ahead, self._ahead = self._run, self._ahead, None
        while True:
            if ahead is not None:
                own, votes = ahead
            else:
                own = self._vote()
                if own.fault is not None and run.world.size == 1:
                    raise own.fault
                votes = run.world.gather_numbers(*own.numbers)
            stops, values, faults, holes, all_masked, data_seconds = zip(*votes, strict=True)
            if any(values):  # ranks learn it at different times
                raise NotFiniteError(next(filter(None, run.world.gather(own.not_finite))))
            if any(faults):
                raise_together(run.world, own.fault)
            if own.batch is None or any(stops):
                run.stop.signal = Signals(max(run.world.gather(run.stop.signal or 0)))
                return Decision.stopped_by(run.stop.signal)
            if not any(holes):
                waited = list(data_seconds) if ahead is None else [0.0] * run.world.size
                return AgreedBatch(own.batch, int(sum(all_masked)) // run.recipe.engine.context, waited)
            _skip_everywhere(run, own.unread)
            ahead = None

    def _vote(self) -> _Ballot:
        """Read this rank's next batch."""
        run, batch, unread, fault = self._run, None, list[Hole](), None
        with run.meter.wait_for_data():
            try:
                run.fence.look()
                with annotate("wait for data"):
                    batch = None if run.stop.signal else next(run.loader, None)  # None if asked to stop while it waited
                unread = run.reading.unread(batch) if batch else []
            except Exception as error:
                fault = error
        return _Ballot(batch, fault, unread, run.store.not_finite, run.meter.data_seconds)


def data_seconds_of(votes: Sequence[Sequence[float]]) -> list[float]:
    """Return the seconds that each rank has waited for data in a step, given the votes that came with its numbers."""
    return [seconds for *_, seconds in votes]


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


def call_together(world: World, function: Callable[[], Item]) -> Item:
    """Call a function on all ranks, and return the result of this one. All ranks fail if one of them does.

    Args:
        world: the ranks.
        function: reads files, and exchanges nothing with other ranks.

    Raises:
        TrainingError: a rank found a fault that a user can correct, or one of its storage; on all ranks.
        CorrectableError, OSError: the fault itself, if there is one process.
    """
    if world.size == 1:
        return function()
    fault: Exception | None = None
    found: Item | None = None
    try:
        found = function()
    except (CorrectableError, OSError) as error:
        fault = error
    if any(world.gather(fault is not None)):
        raise_together(world, fault)
    return cast(Item, found)


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
