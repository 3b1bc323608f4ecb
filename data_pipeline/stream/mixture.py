"""Mixtures: several streams by weight, by a closed-form schedule with one counter for each source.

    sequence number g ─▶ stage ─▶ slot n of the stage ─▶ (source, its own sequence number) ─▶ ByteStream

Arithmetic alone assigns slots to sources: of every n slots, a source with share p has n * p, to within the number of
sources. Weights may change from stage to stage. Each source then continues at its own counter, so no sequence is
repeated or left out. A single corpus is a mixture of one.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.stream.byte_stream import ByteStream
from data_pipeline.stream.order import ORDER_VERSIONS
from data_pipeline.stream.rows import Ids, Rows, interleave

SHARE_BITS = 24
"""Shares are multiples of 2**-24, as integers. This makes the schedule exact for MOST_SEQUENCES."""
MOST_SEQUENCES = 1 << 38
"""Largest number of sequences of a run."""
SCHEDULE_VERSION = 1
"""Version of the schedule, which is part of the fingerprint. It increases if the schedule ever changes."""


@dataclass(frozen=True)
class Stage:
    """Weights that hold from a sequence number on."""

    first_sequence: int
    """First sequence of the stage."""
    weights: Mapping[str, float]
    """Weight of every source; 0 leaves it out."""


class RowSources(NamedTuple):
    """Sources of the rows of a rank's micro-batches."""

    total: int
    """Number of sources of the mixture."""
    of_rows: list[NDArray[np.int64]]
    """(rows,) number of each row's source in the order of names, by micro-batch."""


class Schedule:
    """Source of each sequence of a run, and its number among the source's own sequences.

    Args:
        names: names of the sources, in their order.
        stages: stages in order; the first begins at sequence 0.
    """

    def __init__(self, names: Sequence[str], stages: Sequence[Stage]) -> None:
        self.names = tuple(names)
        self._starts = np.array([stage.first_sequence for stage in stages], np.int64)
        assert self._starts[0] == 0 and (np.diff(self._starts) > 0).all()
        self._shares = np.array([_shares([stage.weights[name] for name in names]) for stage in stages], np.int64)
        counts = np.zeros((len(stages), len(names)), np.int64)
        for stage, slots in enumerate(np.diff(self._starts)):
            counts[stage + 1] = counts[stage] + _taken(self._shares[stage], int(slots))
        self._counts = counts
        """(stages, sources): sequences of each source before each stage."""

    def place(self, sequences: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for each sequence number its source, as an index of `names`, and its number among the source's own."""
        sources, numbers = np.empty_like(sequences), np.empty_like(sequences)
        stages = self._starts.searchsorted(sequences, side="right") - 1
        for stage in np.unique(stages):
            here = stages == stage
            source, number = _places(self._shares[stage], sequences[here] - self._starts[stage])
            sources[here], numbers[here] = source, number + self._counts[stage][source]
        return sources, numbers

    def counters(self, sequence: int) -> dict[str, int]:
        """Return how many sequences of each source come before sequence number `sequence`."""
        stage = int(self._starts.searchsorted(sequence, side="right")) - 1
        taken = self._counts[stage] + _taken(self._shares[stage], sequence - int(self._starts[stage]))
        return dict(zip(self.names, taken.tolist(), strict=True))


def _shares(weights: Sequence[float]) -> list[int]:
    """Return each source's share of the slots that the sources before it leave, in units of 2**-SHARE_BITS."""
    left = [sum(weights[index:]) for index in range(len(weights))]
    return [round(weight / rest * (1 << SHARE_BITS)) if rest else 0 for weight, rest in zip(weights, left, strict=True)]


def left_out(weights: Mapping[str, float]) -> list[str]:
    """Return the sources whose weight is so small, relative to the others, that they have no share."""
    names = sorted(weights)
    taken = _taken(_shares([weights[name] for name in names]), 1 << SHARE_BITS)
    return [name for name, count in zip(names, taken, strict=True) if weights[name] and not count]


def _split(share: NDArray[np.int64] | int, slots: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Return how many of the first `slots` slots that a source is offered it takes: slots * share, rounded."""
    return np.asarray(slots * share + (1 << (SHARE_BITS - 1))) >> SHARE_BITS


def _taken(shares: Sequence[int] | NDArray[np.int64], slots: int) -> NDArray[np.int64]:
    taken = np.zeros(len(shares), np.int64)
    for source, share in enumerate(shares):
        taken[source] = _split(share, slots)
        slots -= int(taken[source])
    return taken


def _places(shares: NDArray[np.int64], slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each slot's source, and the number of slots before it that the source took."""
    slots = slots.copy()  # numbers among the slots that no earlier source has taken
    sources, numbers = np.full_like(slots, -1), np.empty_like(slots)
    for source, share in enumerate(shares):
        before = _split(share, slots)
        takes = (sources < 0) & (_split(share, slots + 1) > before)
        sources[takes], numbers[takes] = source, before[takes]
        slots -= before
    return sources, numbers


def fingerprint_of(streams: Mapping[str, ByteStream], names: Collection[str] | None = None) -> str:
    """Return the digest of everything on which the sources' bytes depend. Stages are part of a run's record.

    Args:
        streams: streams by source.
        names: sources that count, such as those that a run had before others were added. None: all.
    """
    if names is not None:
        streams = {name: stream for name, stream in streams.items() if name in names}
    if len(streams) == 1:
        return next(iter(streams.values())).fingerprint
    identity = {"schedule": SCHEDULE_VERSION, **{name: stream.fingerprint for name, stream in streams.items()}}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def as_begun(streams: Mapping[str, ByteStream], fingerprint: str, names: Collection[str]) -> dict[str, ByteStream]:
    """Return streams in the version of the order that a run began with.

    Args:
        streams: streams by source.
        fingerprint: of the run.
        names: sources of the run that the fingerprint covers.

    Returns:
        The streams that have this fingerprint; those of the newest version if none have.
    """
    for version in ORDER_VERSIONS:
        begun = {name: stream.in_version(version) for name, stream in streams.items()}
        if fingerprint_of(begun, names) == fingerprint:
            return begun
    return dict(streams)


class Mixture:
    """Several streams as one, with the methods of a stream: `read`, `read_groups`, `[]`, `sequence_length`.

    Args:
        streams: streams by source.
        stages: see Schedule.
    """

    def __init__(self, streams: Mapping[str, ByteStream], stages: Sequence[Stage]) -> None:
        self.streams = {name: streams[name] for name in sorted(streams)}  # the order in a recipe has no effect
        self.schedule = Schedule(tuple(self.streams), stages)
        self.sequence_length = next(iter(streams.values())).sequence_length

    def place(self, sequence: int) -> tuple[str, int]:
        """Return the source of a sequence, and its number among the source's own."""
        sources, numbers = self.schedule.place(np.array([sequence], np.int64))
        return self.schedule.names[sources[0]], int(numbers[0])

    def epochs(self, sequence: int) -> dict[str, float]:
        """Return how many times each source has been read before sequence number `sequence`, as fractions."""
        counters = self.schedule.counters(sequence)
        return {name: counters[name] / stream.sequences_per_epoch for name, stream in self.streams.items()}

    def __getitem__(self, sequence: int) -> Ids:
        row: Ids = self.read(np.array([sequence], np.int64)).ids[0]
        return row

    def read(self, sequences: NDArray[np.int64]) -> Rows:
        """Return training sequences as one group. See `read_groups`."""
        return self.read_groups([sequences])[0]

    def read_groups(self, groups: Sequence[NDArray[np.int64]]) -> list[Rows]:
        """Return groups of training sequences. See ByteStream.read_groups."""
        placed = [self.schedule.place(group) for group in groups]
        streams = list(self.streams.values())
        if len(streams) == 1:
            return streams[0].read_groups([numbers for _, numbers in placed])
        parts: list[list[tuple[NDArray[np.intp], Rows]]] = [[] for _ in groups]
        for source, stream in enumerate(streams):
            rows_of = [np.flatnonzero(sources == source) for sources, _ in placed]
            read = stream.read_groups([numbers[rows] for (_, numbers), rows in zip(placed, rows_of, strict=True)])
            for own, rows, part in zip(parts, rows_of, read, strict=True):
                own.append((rows, part))
        return [interleave(own) for own in parts]
