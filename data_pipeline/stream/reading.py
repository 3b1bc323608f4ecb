"""What a run reads, and the record of what it has read.

    DataConfig ─▶ open_reading ─▶ Reading: a Mixture of ByteStreams, and its record
                                     ▲ │
                checkpoint's state ──┘ └─▶ state for the next checkpoint; replay; where a step's row came from

The state is small and says all: counters follow from the sequence number, and what may change on the way (batch size,
weights, damaged blocks, withdrawn documents) is recorded with the sequence it changed at.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, Field, model_validator

from byteloom.core.locations import LocationText
from data_pipeline.corpus.shards import Corpus
from data_pipeline.corpus.storage import RemoteConfig
from data_pipeline.corpus.withdrawn import Withdrawal, prefix_digest
from data_pipeline.errors import CorpusError
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.stream.loader import WINDOW, Batch, Loader, LoaderConfig
from data_pipeline.stream.mixture import Mixture, Stage, left_out
from data_pipeline.stream.rows import DIGEST_MODULUS

ONLY_SOURCE = "corpus"
"""Name of the source of a run that reads one corpus."""


class SourceConfig(PackingConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """One corpus of a mixture."""

    shards: LocationText
    """Folder or URL of a corpus that `byteloom prepare` wrote."""
    weight: float = Field(default=1.0, ge=0)
    """Sequences of this source in proportion to the other sources' weights, from the first step on."""


class StageConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A change of a mixture's weights."""

    step: int = Field(ge=1)
    """The new weights hold after this many steps."""
    weights: dict[str, Annotated[float, Field(ge=0)]]
    """By source; a source that is not named keeps its weight."""


class DataConfig(PackingConfig, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What a run reads, and in which order. Either `shards`, or `mixture`."""

    shards: LocationText | None = None
    """Folder or URL of a corpus that `byteloom prepare` wrote, with manifest.json in it."""
    mixture: dict[str, SourceConfig] = Field(default={})
    """Several corpora by weight: for each, under a name of your choice, its shards, weight, packing and
    separate_documents."""
    stages: tuple[StageConfig, ...] = ()
    """Changes of the mixture's weights on the way: a list of step and weights."""
    lanes: int = Field(default=128, ge=1)
    """Places of a corpus that are read side by side; with at least as many as a global batch has rows, its rows are
    strangers; with just as many, each row goes on in the same row of the next batch. Memory of the loader: for each
    corpus a block (of 1 MiB as a rule) a lane, two at most."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Changes the order of each corpus in every epoch."""
    bad_blocks: int = Field(default=0, ge=0)
    """Damaged blocks that a run may meet in each corpus before it stops. Each is a hole: its bytes are padding, count
    in no loss, and nothing after them moves."""
    remote: RemoteConfig = RemoteConfig()

    @model_validator(mode="after")
    def _is_one_or_several(self) -> Self:
        if (self.shards is None) == (not self.mixture):
            raise ValueError("name either shards, a corpus, or mixture, several of them")
        if self.stages and not self.mixture:
            raise ValueError("stages change the weights of a mixture, and there is none")
        return self

    @model_validator(mode="after")
    def _sources_can_be_named(self) -> Self:
        for name in self.mixture:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"{name!r} is no name of a source: letters, digits, _ and - can stand in one")
        return self

    @model_validator(mode="after")
    def _stages_follow_each_other(self) -> Self:
        if any(later.step <= earlier.step for earlier, later in pairwise(self.stages)):
            raise ValueError("stages are in the order of their steps, each at another step")
        for stage in self.stages:
            if unknown := sorted(stage.weights.keys() - self.mixture.keys()):
                raise ValueError(
                    f"the stage of step {stage.step} names {unknown[0]}, which is no source of the mixture"
                )
        for step, weights in self.weight_stages():
            if not any(weights.values()):
                raise ValueError(f"from step {step} on no source has a weight")
            if starved := left_out(weights):
                raise ValueError(f"from step {step} on {starved[0]} has so little weight that it would never be read")
        return self

    def sources(self) -> dict[str, SourceConfig]:
        if self.shards is None:
            return self.mixture
        packing = PackingConfig.model_validate(self.model_dump(include=set(PackingConfig.model_fields)))
        return {ONLY_SOURCE: SourceConfig(shards=self.shards, **packing.model_dump())}

    def weight_stages(self) -> list[tuple[int, dict[str, float]]]:
        """The weights of every source, from each step at which they change."""
        weights = {name: source.weight for name, source in self.sources().items()}
        stages = [(0, weights)]
        for stage in self.stages:
            weights = weights | stage.weights
            stages.append((stage.step, weights))
        return stages


@dataclass
class Record:
    """What a run has read, as its checkpoint keeps it."""

    step: int = 0
    """Steps done."""
    next_sequence: int = 0
    batches: list[tuple[int, int, int]] = field(default_factory=list)
    """(step, sequence, global batch): after that step, from that sequence on, steps had so many sequences."""
    stages: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)
    """(step, sequence, weights) of every stage begun."""
    holes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By source: damaged blocks, and the source's own first sequence that did not read each."""
    withdrawn: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    """By source: (sequence, count, digest): from the source's own sequence on, that many entries of its list of
    withdrawn documents were in force; `prefix_digest` of them."""
    digest: str = "0" * 64
    """Rows.digest of all sequences read, in hexadecimal. A rank's own holds what it has read since the start; the
    first rank's, also what the run had read before."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The record that `Reading.state` gave, come back from JSON."""
        lists = {name: [tuple(entry) for entry in state[name]] for name in ("batches", "stages")} | {
            name: {source: [tuple(entry) for entry in entries] for source, entries in state[name].items()}
            for name in ("holes", "withdrawn")
        }
        return cls(**{**state, **lists})


class Reading:
    """A run's mixture, and its record.

    Args:
        streams: by source.
        record: of the checkpoint that the run goes on from; changed in place as the run goes on.
        global_batch: sequences of a step from here on; None to look at what was.

    Raises:
        CorpusError: what the recipe says of the past is not what was.
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
        """Lays out what is to come after the record, and checks that the recipe agrees with it."""
        record = self.record
        past = [(step, weights) for step, _, weights in record.stages if step < record.step]
        told = [(step, weights) for step, weights in config.weight_stages() if step < record.step]
        if past and past != told:
            raise CorpusError(
                f"until step {record.step}, the run read with the weights {_in_words(past)}, and the recipe now has "
                f"{_in_words(told)} there. Restore the old weights, and change them from a later step with a stage in "
                f"data.stages (step {record.step} or later)"
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
        """Documents withdrawn since the record are not read from here on."""
        history = self.record.withdrawn.setdefault(name, [])
        known, now = history[-1][1] if history else 0, len(stream.corpus.withdrawn)
        if now > known:
            counters = self.mixture.schedule.counters(self.record.next_sequence)
            history.append((counters[name], now, prefix_digest(stream.corpus.withdrawn, now)))

    def advance(self, batch: Batch) -> None:
        """A step has been made of a batch."""
        record = self.record
        record.step += 1
        record.next_sequence = batch.next_sequence
        record.digest = f"{(int(record.digest, 16) + batch.digest) % DIGEST_MODULUS:064x}"
        self._begin_stages()

    @property
    def goes_on(self) -> bool:
        """Whether each row of the next batch begins where the same row of the batch before ended."""
        (stream, *others) = self.mixture.streams.values()
        in_step = stream.order.lanes == self.record.batches[-1][2] and not others
        return in_step and self.record.next_sequence % stream.sequences_per_epoch != 0

    def epochs(self) -> dict[str, float]:
        """How often each source has been read through."""
        return self.mixture.epochs(self.record.next_sequence)

    def state(self) -> dict[str, Any]:
        """The record as JSON."""
        counters = self.mixture.schedule.counters(self.record.next_sequence)
        self.record.holes = {
            # What was only read ahead has not been read.
            name: sorted((block, since) for block, since in stream.holes.items() if since < counters[name])
            for name, stream in self.mixture.streams.items()
        }
        return asdict(self.record)

    @property
    def holes(self) -> int:
        """Damaged blocks met so far, by the loader's reading ahead too."""
        return sum(len(stream.holes) for stream in self.mixture.streams.values())

    def close(self) -> None:
        """Closes the corpora; what is being fetched from afar fails at once."""
        for stream in self.mixture.streams.values():
            stream.corpus.close()

    def sequences_in_all(self, steps: int) -> int:
        """How many sequences the run will have read after so many steps, if its batch stays as it is."""
        begun, sequence, global_batch = self.record.batches[-1]
        return sequence + (steps - begun) * global_batch

    def sequence_of(self, step: int, row: int) -> int:
        """The sequence number of a row of a step, counted from 1 and from 0.

        Raises:
            CorpusError: the run has had no such step, or a step no such row.
        """
        if not 1 <= step <= self.record.step:
            raise CorpusError(f"step {step} is not in this checkpoint; choose a step from 1 to {self.record.step}")
        before, sequence, global_batch = max(entry for entry in self.record.batches if entry[0] < step)
        if not 0 <= row < global_batch:
            raise CorpusError(f"row {row} is not in step {step}; choose a row from 0 to {global_batch - 1}")
        return sequence + (step - 1 - before) * global_batch + row


def open_streams(config: DataConfig, sequence_length: int) -> dict[str, ByteStream]:
    """Opens the corpora of a recipe.

    Raises:
        CorpusError: a corpus is missing, damaged or shorter than a sequence.
    """
    streams: dict[str, ByteStream] = {}
    with ExitStack() as opened:
        for name, source in config.sources().items():
            streams[name] = open_stream(config, source, sequence_length)
            opened.enter_context(streams[name].corpus)
        opened.pop_all()  # all are open: they stay so
    return streams


def open_stream(config: DataConfig, source: SourceConfig, sequence_length: int) -> ByteStream:
    """Open one corpus of a recipe.

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


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks have read, of what `Reading.state` gave each of them: they differ in holes and digest."""
    state = dict(states[0])
    state["digest"] = f"{sum(int(each['digest'], 16) for each in states) % DIGEST_MODULUS:064x}"
    holes: dict[str, dict[int, int]] = {}
    for each in states:
        for source, entries in each["holes"].items():
            known = holes.setdefault(source, {})
            for block, since in entries:
                known[block] = min(since, known.get(block, since))
    state["holes"] = {source: sorted(known.items()) for source, known in holes.items()}
    return state


def _in_words(stages: list[tuple[int, dict[str, float]]]) -> str:
    return ", ".join(f"{weights} after step {step}" if step else str(weights) for step, weights in stages)


def _in_force(stream: ByteStream, history: list[tuple[int, int, str]]) -> list[tuple[Withdrawal, int]]:
    """The entries of a corpus's list of withdrawn documents that the record knows, with where they came into force."""
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
    """Reads again every sequence that a record says was read; the digest of what comes.

    Args:
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
