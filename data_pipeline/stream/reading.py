"""Reading of a run: the corpora of a recipe as one mixture, with the record of what has been read.

DataConfig ─▶ open_streams ─▶ Reading: a Mixture of ByteStreams, and its record
                                 ▲ │
            checkpoint's state ──┘ └─▶ state for the next checkpoint; replay; the origin of a step's row
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import numpy as np

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.withdrawn import Withdrawal, prefix_digest
from data_pipeline.errors import CorpusError
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.stream.config import DataConfig, SourceConfig
from data_pipeline.stream.loader import WINDOW, Batch, Loader, LoaderConfig
from data_pipeline.stream.mixture import Mixture, Stage
from data_pipeline.stream.record import Record
from data_pipeline.stream.rows import DIGEST_MODULUS


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
        self._upcoming = list[tuple[int, int, dict[str, float]]]()
        if global_batch is not None:
            self._plan(config, global_batch)
        stages = [Stage(sequence, weights) for _, sequence, weights in [*record.stages, *self._upcoming]]
        self.mixture = Mixture(streams, stages)
        for name, stream in streams.items():
            if global_batch is not None:
                self._take_up_withdrawals(name, stream)
            stream.withdraw(_in_force(stream, record.withdrawn.get(name, [])))
            stream.remember_holes(dict(record.holes.get(name, [])))

    def _plan(self, config: DataConfig, global_batch: int) -> None:
        """Plan the stages after the record, and check that the recipe agrees with the stages before."""
        record = self.record
        past = [(step, weights) for step, _, weights in record.stages if step < record.step]
        planned = [(step, weights) for step, weights in config.weight_stages() if step < record.step]
        if past and past != planned:
            raise CorpusError(
                f"until step {record.step}, the run read with the weights {_in_words(past)}, and the recipe now has "
                f"{_in_words(planned)} there. Restore the old weights, and change them from a later step with a stage "
                f"in data.stages (step {record.step} or later)"
            )
        later = config.weight_stages()[len(past) :]
        record.stages = record.stages[: len(past)]
        self._upcoming = [
            (step, record.next_sequence + (step - record.step) * global_batch, weights) for step, weights in later
        ]
        self._begin_stages()
        record.batches = [entry for entry in record.batches if entry[0] < record.step]
        if not record.batches or record.batches[-1][2] != global_batch:
            record.batches.append((record.step, record.next_sequence, global_batch))

    def _begin_stages(self) -> None:
        while self._upcoming and self._upcoming[0][0] <= self.record.step:
            self.record.stages.append(self._upcoming.pop(0))

    def _take_up_withdrawals(self, name: str, stream: ByteStream) -> None:
        """Record the documents that were withdrawn since the last start; they are not read from here on."""
        history = self.record.withdrawn.setdefault(name, [])
        known, now = history[-1][1] if history else 0, len(stream.corpus.withdrawn)
        if now > known:
            counters = self.mixture.schedule.counters(self.record.next_sequence)
            history.append((counters[name], now, prefix_digest(stream.corpus.withdrawn, now)))

    def advance(self, batch: Batch) -> None:
        """Record that a step has used a batch."""
        record = self.record
        record.step += 1
        record.next_sequence = batch.next_sequence
        record.digest = f"{(int(record.digest, 16) + batch.digest) % DIGEST_MODULUS:064x}"
        self._begin_stages()

    @property
    def goes_on(self) -> bool:
        """Whether each row of the next batch continues the same row of the previous batch."""
        (stream, *others) = self.mixture.streams.values()
        in_step = stream.order.lanes == self.record.batches[-1][2] and not others
        return in_step and self.record.next_sequence % stream.sequences_per_epoch != 0

    def epochs(self) -> dict[str, float]:
        """Return how many times each source has been read, as fractions."""
        return self.mixture.epochs(self.record.next_sequence)

    def state(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        counters = self.mixture.schedule.counters(self.record.next_sequence)
        self.record.holes = {
            # Blocks that the loader has only read ahead do not count as read.
            name: sorted((block, since) for block, since in stream.holes.items() if since < counters[name])
            for name, stream in self.mixture.streams.items()
        }
        return asdict(self.record)

    @property
    def holes(self) -> int:
        """Number of damaged blocks found so far, including those that the loader has read ahead."""
        return sum(len(stream.holes) for stream in self.mixture.streams.values())

    def close(self) -> None:
        """Close the corpora. Remote requests in progress fail at once."""
        for stream in self.mixture.streams.values():
            stream.corpus.close()

    def sequences_in_all(self, steps: int) -> int:
        """Return how many sequences the run will have read after so many steps with the present global batch."""
        begun, sequence, global_batch = self.record.batches[-1]
        return sequence + (steps - begun) * global_batch

    def sequence_of(self, step: int, row: int) -> int:
        """Return the sequence number of a row of a step.

        Args:
            step: number of the step, counted from 1.
            row: number of the row in the global batch, counted from 0.

        Raises:
            CorpusError: the run has no such step yet, or the step no such row.
        """
        if not 1 <= step <= self.record.step:
            raise CorpusError(f"step {step} is not in this checkpoint; choose a step from 1 to {self.record.step}")
        before, sequence, global_batch = max(entry for entry in self.record.batches if entry[0] < step)
        if not 0 <= row < global_batch:
            raise CorpusError(f"row {row} is not in step {step}; choose a row from 0 to {global_batch - 1}")
        return sequence + (step - 1 - before) * global_batch + row


def open_streams(config: DataConfig, sequence_length: int) -> dict[str, ByteStream]:
    """Open the corpora of a recipe, and return their streams by source.

    Raises:
        CorpusError: a corpus is missing, damaged or shorter than a sequence.
    """
    streams: dict[str, ByteStream] = {}
    with ExitStack() as opened:
        for name, source in config.sources().items():
            streams[name] = open_stream(config, source, sequence_length)
            opened.enter_context(streams[name].corpus)
        opened.pop_all()  # keep them open
    return streams


def open_stream(config: DataConfig, source: SourceConfig, sequence_length: int) -> ByteStream:
    """Open one corpus of a recipe, and return its stream.

    Args:
        config: the recipe's data node.
        source: the corpus.
        sequence_length: length of a training sequence.

    Raises:
        CorpusError: the corpus is missing, damaged or shorter than a sequence.
    """
    with ExitStack() as opened:
        stream = ByteStream(
            opened.enter_context(Corpus(source.shards, remote=config.remote)),
            PackingConfig(packing=source.packing, separate_documents=source.separate_documents),
            sequence_length,
            lanes=config.lanes,
            seed=config.seed,
            bad_blocks=config.bad_blocks,
        )
        opened.pop_all()
    return stream


def _in_words(stages: list[tuple[int, dict[str, float]]]) -> str:
    return ", ".join(f"{weights} after step {step}" if step else str(weights) for step, weights in stages)


def _in_force(stream: ByteStream, history: list[tuple[int, int, str]]) -> list[tuple[Withdrawal, int]]:
    """Return the withdrawn documents that the record knows, each with the sequence from which it is masked."""
    entries = stream.corpus.withdrawn
    in_force, done = list[tuple[Withdrawal, int]](), 0
    for since, count, digest in history:
        if len(entries) < count or prefix_digest(entries, count) != digest:
            raise CorpusError(
                f"{stream.corpus.location}: the list of withdrawn documents lacks entries that the run has read; "
                "restore the list, to which entries may only be added"
            )
        in_force += [(entry, since) for entry in entries[done:count]]
        done = count
    return in_force


def replay(reading: Reading, threads: int, progress: Callable[[int], None]) -> str:
    """Read all sequences of a record again, and return their digest.

    Args:
        reading: the record, and the mixture to read.
        threads: number of threads that read.
        progress: called with the number of sequences read since the last call.

    Raises:
        CorpusError: a block that the run read cannot be read.
    """
    left, digest = reading.record.next_sequence, 0
    rows = max(1, WINDOW // reading.mixture.sequence_length // 8)
    with Loader(
        reading.mixture, LoaderConfig(threads=threads), global_batch=rows, micro_batch=rows, digest=True
    ) as loader:
        for batch in loader:
            if left < rows:
                break
            digest += batch.digest
            left -= rows
            progress(rows)
    first = reading.record.next_sequence - left
    last = np.arange(first, first + left)
    digest += reading.mixture.read(last).digest(last.tolist())
    progress(left)
    return f"{digest % DIGEST_MODULUS:064x}"
