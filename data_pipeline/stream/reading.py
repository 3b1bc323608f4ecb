"""Reading of a run: the corpora of a recipe as one mixture, with the record of what has been read.

DataConfig ─▶ open_streams ─▶ Reading: a Mixture of ByteStreams, and its record
                                 ▲ │
            checkpoint's state ──┘ └─▶ state for the next checkpoint; replay; the origin of a step's row

Ranks read different rows, so one rank may find a damaged block that no other rank touches, or that others could read.
Before a batch is trained, all ranks exchange what they could not read for it (`unread`). Each passes the blocks of all
ranks to `skip`, and the batch is read again. Rows, holes, their budget and the record are then the same everywhere.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from byteloom.core.text import count
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.entropies import EntropiesKey, StoredEntropies
from data_pipeline.corpus.withdrawn import Withdrawal, prefix_digest
from data_pipeline.errors import CorpusError, CorruptBlockError, DamagedCorpusError
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.stream.config import DataConfig, SourceConfig
from data_pipeline.stream.loader import WINDOW, Batch, Loader, LoaderConfig
from data_pipeline.stream.mixture import Mixture, RowSources, Schedule, Stage
from data_pipeline.stream.record import Record
from data_pipeline.stream.rows import DIGEST_MODULUS
from data_pipeline.stream.skips import Skips

log = logging.getLogger(__name__)


class Hole(NamedTuple):
    """A damaged block, which a run does not read from some sequence on."""

    source: str
    """Name of the source."""
    block: int
    """Number of the block."""
    since: int
    """First sequence of the source that does not read it."""
    damage: str
    """Description of the damage."""


class Reading:
    """A run's mixture, and its record.

    Args:
        config: what the recipe says about data.
        streams: streams by source.
        record: record of the checkpoint from which the run resumes. It is changed in place as the run proceeds.
        global_batch: sequences of a step from here on; None only looks at the past.

    Raises:
        CorpusError: the recipe contradicts what the run has read.
    """

    def __init__(
        self, config: DataConfig, streams: Mapping[str, ByteStream], record: Record, global_batch: int | None
    ) -> None:
        self.record = record
        self.skips = Skips(record.skipped)
        """Sequences that no step reads."""
        self._bad_blocks = config.bad_blocks
        self._holes = {name: dict(record.holes.get(name, [])) for name in sorted(streams)}
        """Holes by source: block, and the source's first sequence that skips it."""
        self._has_new_holes = False
        self._upcoming = list[tuple[int, int, dict[str, float]]]()
        if global_batch is not None:
            self._plan(config, global_batch)
        self.mixture = Mixture(streams, self._stages())
        self._record_holes()
        for name, stream in streams.items():
            if global_batch is not None:
                self._take_up_withdrawals(name, stream)
            stream.withdraw(_in_force(stream, record.withdrawn.get(name, [])))
            # While a run trains, all ranks count the holes; to prove the past, only recorded holes may be skipped.
            stream.bad_blocks = 0 if global_batch is None else None

    def _plan(self, config: DataConfig, global_batch: int) -> None:
        """Plan the stages after the record, and check that the recipe agrees with the stages before."""
        record = self.record
        added = dict.fromkeys(config.sources(), 0.0)  # a source that a recipe adds was not read before
        record.stages = [(step, sequence, added | weights) for step, sequence, weights in record.stages]
        # A stage after the last step counts too if sequences of it were skipped.
        past = [(step, weights) for step, sequence, weights in record.stages if sequence < record.next_sequence]
        end = max([record.step, *(step + 1 for step, _ in past)])
        planned = [(step, weights) for step, weights in config.weight_stages() if step < end]
        if past and past != planned:
            raise CorpusError(
                f"until step {record.step}, the run read with the weights {_in_words(past)}, and the recipe now has "
                f"{_in_words(planned)} there. Restore the old weights, and change them from a later step with a stage "
                f"in data.stages (step {record.step} or later)"
            )
        later = config.weight_stages()[len(past) :]
        record.stages = record.stages[: len(past)]
        self._upcoming = [(step, self._first_of(step, global_batch), weights) for step, weights in later]
        self._begin_stages()
        record.batches = [entry for entry in record.batches if entry[0] < record.step]
        if not record.batches or record.batches[-1][2] != global_batch:
            record.batches.append((record.step, record.next_sequence, global_batch))

    def _first_of(self, step: int, global_batch: int) -> int:
        """Return the first sequence after a later step."""
        return self.skips.end(self.record.next_sequence, (step - self.record.step) * global_batch)

    def _stages(self) -> list[Stage]:
        return [Stage(sequence, weights) for _, sequence, weights in [*self.record.stages, *self._upcoming]]

    def _begin_stages(self) -> None:
        while self._upcoming and self._upcoming[0][0] <= self.record.step:
            step, sequence, weights = self._upcoming.pop(0)
            self.record.stages.append((step, sequence, weights))
            if len(weights) > 1:
                log.info("from step %d on, the weights of the sources are %s", step + 1, weights)

    def _take_up_withdrawals(self, name: str, stream: ByteStream) -> None:
        """Record the documents that were withdrawn since the last start; they are not read from here on."""
        history = self.record.withdrawn.setdefault(name, [])
        known, now = history[-1][1] if history else 0, len(stream.corpus.withdrawn)
        if now > known:
            counters = self.mixture.schedule.counters(self.record.next_sequence)
            history.append((counters[name], now, prefix_digest(stream.corpus.withdrawn, now)))

    def unread(self, batch: Batch) -> list[Hole]:
        """Return the blocks that this process could not read for a batch, without the holes that are agreed on."""
        ends = self.mixture.schedule.counters(batch.next_sequence)
        return [
            Hole(name, block, since, stream.damage[block])
            for name, stream in self.mixture.streams.items()
            for block, since in stream.found_holes().items()
            if since < min(ends[name], self._holes[name].get(block, ends[name]))
        ]

    def skip(self, found: Iterable[Hole]) -> None:
        """Skip blocks from the next batch on. Read the batch again then: some of its rows may hold these blocks.

        Args:
            found: `unread` of all ranks for that batch; every rank gets the same.

        Raises:
            CorruptBlockError: these are more holes of a source than the config allows.
        """
        for hole in sorted(found, key=lambda hole: hole.since):
            holes = self._holes[hole.source]
            if hole.block not in holes and len(holes) >= self._bad_blocks:
                raise CorruptBlockError(
                    f"{hole.damage}; data.bad_blocks allows {count(self._bad_blocks, 'damaged block')}"
                )
            if hole.block not in holes:
                log.warning("%s; the loss does not count its bytes", hole.damage)
            holes[hole.block] = min(hole.since, holes.get(hole.block, hole.since))
            self._has_new_holes = True
        for name, stream in self.mixture.streams.items():
            stream.skip(self._holes[name])

    def advance(self, batch: Batch) -> None:
        """Record that a step has used a batch."""
        if self._has_new_holes:
            self._has_new_holes = False
            self._record_holes()
        record = self.record
        record.step += 1
        record.next_sequence = batch.next_sequence
        record.digest = f"{(int(record.digest, 16) + batch.digest) % DIGEST_MODULUS:064x}"
        self._begin_stages()

    def leave_out(self, batch: Batch) -> None:
        """Skip a batch: no step uses its sequences. The next step reads those after it.

        Continue with `Loader.read_again`, since later stages begin at later sequences.
        """
        record = self.record
        self.skips = Skips([*record.skipped, (record.next_sequence, batch.next_sequence - record.next_sequence)])
        record.skipped = self.skips.ranges
        record.next_sequence = batch.next_sequence
        global_batch = record.batches[-1][2]
        self._upcoming = [(step, self._first_of(step, global_batch), weights) for step, _, weights in self._upcoming]
        self.mixture.schedule = Schedule(tuple(self.mixture.streams), self._stages())

    @property
    def goes_on(self) -> bool:
        """Whether each row of the next batch continues the same row of the previous batch."""
        (stream, *others) = self.mixture.streams.values()
        rows, sequence, epoch = self.record.batches[-1][2], self.record.next_sequence, stream.sequences_per_epoch
        skipped = self.skips.within(sequence - rows, sequence + rows)
        in_step = stream.order.lanes == rows and not others and not skipped
        return in_step and (sequence - rows) // epoch == (sequence + rows - 1) // epoch  # all in one epoch

    def sources_of(self, batch: Batch) -> RowSources | None:
        """Return the sources of a batch's rows, in the order of `mixture.streams`; None for a single source."""
        if len(self.mixture.streams) == 1:
            return None
        numbers = [self.skips.take(m.first_sequence, np.arange(len(m.targets))) for m in batch.micro_batches]
        return RowSources(len(self.mixture.streams), [self.mixture.schedule.place(own)[0] for own in numbers])

    def epochs(self) -> dict[str, float]:
        """Return how many times each source has been read, as fractions."""
        return self.mixture.epochs(self.record.next_sequence)

    def _record_holes(self) -> None:
        self.record.holes = {name: sorted(holes.items()) for name, holes in self._holes.items()}
        for name, stream in self.mixture.streams.items():
            stream.remember_holes(self._holes[name])

    def state(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self.record)

    @property
    def holes(self) -> int:
        """Number of damaged blocks that the run skips."""
        return sum(len(holes) for holes in self._holes.values())

    @property
    def sequences_read(self) -> int:
        """Number of sequences that steps have read."""
        return self.record.next_sequence - self.skips.before(self.record.next_sequence)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each source in the present stage."""
        return self.record.stages[-1][2]

    def close(self) -> None:
        """Close the corpora. Remote requests in progress fail at once."""
        for stream in self.mixture.streams.values():
            stream.corpus.close()

    def sequences_in_all(self, steps: int) -> int:
        """Return the sequence after those of so many steps with the present global batch."""
        begun, sequence, global_batch = self.record.batches[-1]
        return self.skips.end(sequence, (steps - begun) * global_batch)

    def sequence_of(self, step: int, row: int) -> int:
        """Return the sequence number of a row of a step.

        Args:
            step: number of the step, counted from 1.
            row: number of the row in the global batch, counted from 0.

        Raises:
            CorpusError: the run has no such step yet, or the step no such row.
        """
        self._check_done(step)
        rows = self.sequences_of(step)
        if not 0 <= row < len(rows):
            raise CorpusError(f"row {row} is not in step {step}; choose a row from 0 to {len(rows) - 1}")
        return int(rows[row])

    def sequences_of(self, step: int) -> NDArray[np.int64]:
        """Return the sequence numbers of the rows of a step.

        A step that is not done will read these sequences if nothing else is skipped before it.

        Args:
            step: number of the step, counted from 1.

        Raises:
            CorpusError: the number is less than 1.
        """
        before, sequence, global_batch = self._batches_of(step)
        return self.skips.take(sequence, (step - 1 - before) * global_batch + np.arange(global_batch))

    def skipped_at(self, step: int) -> list[tuple[int, int]]:
        """Return (first, count) of the ranges of sequences that a step skipped, before its rows or between them.

        Raises:
            CorpusError: the run has no such step yet.
        """
        self._check_done(step)
        before, sequence, global_batch = self._batches_of(step)
        begin, end = (self.skips.end(sequence, (each - before) * global_batch) for each in (step - 1, step))
        return [(first, count) for first, count in self.skips.ranges if begin <= first < end]

    def _check_done(self, step: int) -> None:
        if not 1 <= step <= self.record.step:
            raise CorpusError(f"step {step} is not in this checkpoint; choose a step from 1 to {self.record.step}")

    def _batches_of(self, step: int) -> tuple[int, int, int]:
        """Return the entry of `Record.batches` that a step belongs to."""
        if step < 1:
            raise CorpusError(f"there is no step {step}; the first is step 1")
        return max(entry for entry in self.record.batches if entry[0] < step)


def open_streams(
    config: DataConfig, sequence_length: int, entropies: EntropiesKey | None = None
) -> dict[str, ByteStream]:
    """Open the corpora of a recipe, and return their streams by source. Arguments are those of `open_stream`.

    Raises:
        CorpusError: a corpus is missing, damaged or shorter than a sequence.
    """
    streams: dict[str, ByteStream] = {}
    with ExitStack() as opened:
        for name, source in config.sources().items():
            streams[name] = open_stream(config, source, sequence_length, entropies)
            opened.enter_context(streams[name].corpus)
        opened.pop_all()  # keep them open
    return streams


def open_stream(
    config: DataConfig, source: SourceConfig, sequence_length: int, entropies: EntropiesKey | None = None
) -> ByteStream:
    """Open one corpus of a recipe, and return its stream.

    Args:
        config: the recipe's data node.
        source: the corpus.
        sequence_length: length of a training sequence.
        entropies: entropies beside the corpus that rows have too; None: they have none.

    Raises:
        CorpusError: the corpus is missing, damaged or shorter than a sequence, or has no such entropies.
    """
    with ExitStack() as opened:
        corpus = opened.enter_context(Corpus(source.shards, remote=config.remote, digest=source.shards_sha256))
        stream = ByteStream(
            corpus,
            PackingConfig.model_validate(source.model_dump(include=set(PackingConfig.model_fields))),
            sequence_length,
            lanes=config.lanes,
            seed=config.seed,
            bad_blocks=config.bad_blocks,
            entropies=None if entropies is None else StoredEntropies(corpus, entropies),
        )
        opened.pop_all()
    return stream


def _in_words(stages: list[tuple[int, dict[str, float]]]) -> str:
    return ", ".join(f"{weights} after step {step}" if step else str(weights) for step, weights in stages)


def _in_force(stream: ByteStream, history: list[tuple[int, int, str]]) -> list[tuple[Withdrawal, int]]:
    """Return the withdrawn documents that the record knows, each with the sequence from which it is masked."""
    entries = stream.corpus.withdrawn
    in_force, done = list[tuple[Withdrawal, int]](), 0
    for since, length, digest in history:
        if len(entries) < length or prefix_digest(entries, length) != digest:
            raise DamagedCorpusError(
                f"{stream.corpus.location}: the list of withdrawn documents lacks entries that the run has read; "
                "restore the list, to which entries may only be added"
            )
        in_force += [(entry, since) for entry in entries[done:length]]
        done = length
    return in_force


def replay(reading: Reading, threads: int, progress: Callable[[int], None]) -> str:
    """Read all sequences of a record again, except those that it skips, and return their digest.

    Args:
        reading: the record, and the mixture to read.
        threads: number of threads that read.
        progress: called with the number of sequences read since the last call.

    Raises:
        CorpusError: a block that the run read cannot be read.
    """
    skips, sequences, digest = reading.skips, reading.sequences_read, 0
    rows = max(1, WINDOW // reading.mixture.sequence_length // 8)
    left = sequences % rows
    with Loader(
        reading.mixture, LoaderConfig(threads=threads), global_batch=rows, micro_batch=rows, digest=True
    ) as loader:
        for batch in loader.without(skips).until(skips.end(0, sequences - left)):
            digest += batch.digest
            progress(rows)
    last = skips.take(0, np.arange(sequences - left, sequences))
    digest += reading.mixture.read(last).digest(last.tolist())
    progress(left)
    return f"{digest % DIGEST_MODULUS:064x}"
