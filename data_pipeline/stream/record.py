"""Record of what a run has read. Checkpoints keep it.

The record is small and complete. The counters of all sources follow from the sequence number. What may change during a
run (batch size, weights, damaged blocks, withdrawn documents) is recorded with the sequence at which it changed. The
skipped sequences are recorded as ranges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from data_pipeline.stream.rows import DIGEST_MODULUS


@dataclass
class Record:
    """Record of the data that a run has read."""

    step: int = 0
    """Steps done."""
    next_sequence: int = 0
    """Number of the next training sequence."""
    batches: list[tuple[int, int, int]] = field(default_factory=list)
    """(step, sequence, global batch): after this step, from this sequence on, a step had so many sequences."""
    stages: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)
    """(step, sequence, weights) of every stage that has begun."""
    holes: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Damaged blocks by source, each with the source's first sequence that skipped it."""
    withdrawn: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    """(sequence, count, digest) by source. From this sequence of the source on, the first `count` entries of its list
    of withdrawn documents were masked. The digest is their `prefix_digest`."""
    skipped: list[tuple[int, int]] = field(default_factory=list)
    """(first, count) of the ranges of sequences that no step reads; some may lie ahead."""
    digest: str = "0" * 64
    """Rows.digest of all sequences read, in hexadecimal. A rank's record holds what the rank has read since the start;
    the first rank's also holds what the run had read before."""

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the record that `Reading.state` made, after its way through JSON."""
        plain = ("batches", "stages", "skipped")  # older versions skip nothing
        lists = {name: [tuple(entry) for entry in state.get(name, [])] for name in plain} | {
            name: {source: [tuple(entry) for entry in entries] for source, entries in state[name].items()}
            for name in ("holes", "withdrawn")
        }
        return cls(**{**state, **lists})


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of all ranks.

    Args:
        states: `Reading.state` of each rank. They differ in their digest only.
    """
    digest = f"{sum(int(each['digest'], 16) for each in states) % DIGEST_MODULUS:064x}"
    [state, *others] = [{**each, "digest": digest} for each in states]
    for rank, other in enumerate(others, 1):
        assert other == state, f"rank {rank} has read other data than rank 0: {other}, and {state}"
    return state
