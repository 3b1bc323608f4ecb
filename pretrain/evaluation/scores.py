"""Exact sums of nats.

Losses are added as whole multiples of 2^-32 nats. Sums over groups, over positions and over bytes of samples are
therefore the same number to the last bit, in any order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from byteloom.core.errors import CorrectableError
from pretrain.evaluation.windows import ScoredWindow

UNITS_PER_NAT = 2**32
HIGHEST_NATS = 2.0**20
"""Largest loss of a byte, in nats. A higher loss or NaN is an error."""

SAMPLE_BYTES = ("low byte", "high byte")
"""Names of the bytes of a sample of sound, in order."""

GroupOf = Callable[[str], str]
"""Function from the key of a document to its group."""

Units = NDArray[np.int64]


def in_units(nats: NDArray[np.floating]) -> Units:
    """Return losses of bytes as whole numbers of units.

    Raises:
        ValueError: a loss is not finite, or too high.
    """
    good = np.abs(nats) < HIGHEST_NATS
    if not good.all():
        raise ValueError(f"{nats[~good][0]} nats for one byte")
    return np.rint(nats.astype(np.float64) * UNITS_PER_NAT).astype(np.int64)


@dataclass
class Score:
    """Sums over bytes: loss, bytes and documents."""

    units: int = 0
    """Loss in nats, times UNITS_PER_NAT."""
    bytes: int = 0
    documents: int = 0
    likeliest: int | None = None
    """Bytes that were the likeliest ones at their places; None if they were not counted."""

    @property
    def nats(self) -> float:
        """Loss in nats."""
        return self.units / UNITS_PER_NAT

    @property
    def bits_per_byte(self) -> float:
        """Mean loss of a byte, in bits."""
        return self.nats / self.bytes / math.log(2)

    def word_perplexity(self, words: int) -> float:
        """Return the perplexity per word: two to the power of bits per byte times bytes per word."""
        nats_per_word = self.nats / words
        return math.exp(nats_per_word) if nats_per_word < math.log(1e300) else math.inf

    def add(self, other: "Score") -> None:
        """Add the sums of another score."""
        self.units += other.units
        self.bytes += other.bytes
        self.documents += other.documents
        if other.likeliest is not None:
            self.likeliest = (self.likeliest or 0) + other.likeliest


class Curve:
    """Scores by position, from 0."""

    def __init__(self) -> None:
        self._units, self._bytes = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, first: int, units: Units) -> None:
        """Add the losses of bytes at consecutive positions from `first`."""
        end = first + len(units)
        missing = end - len(self._units)
        if missing > 0:
            self._units, self._bytes = np.pad(self._units, (0, missing)), np.pad(self._bytes, (0, missing))
        self._units[first:end] += units
        self._bytes[first:end] += 1

    def scores(self, period: int | None = None) -> list[Score]:
        """Return the score of each position, or of each position modulo a period, such as the place in a patch."""
        period = period or len(self._units)
        # Python's integers do not overflow.
        return [
            Score(sum(self._units[place::period].tolist()), sum(self._bytes[place::period].tolist()))
            for place in range(min(period, len(self._units)))
        ]


class EvaluationError(CorrectableError):
    """A model cannot be evaluated as asked."""


@dataclass
class Evaluation:
    """Losses of all bytes, summed by group, by position, and by byte of a sample. All sums have the same total."""

    groups: dict[str, Score] = field(default_factory=dict)
    positions: Curve = field(default_factory=Curve)
    """Scores by position in the window."""
    sample_bytes: dict[str, Score] = field(default_factory=dict)
    """Scores of sound (16-bit little-endian PCM), by SAMPLE_BYTES."""

    @property
    def total(self) -> Score:
        """Score of all bytes."""
        total = Score()
        for score in self.groups.values():
            total.add(score)
        return total

    def add(self, windows: Sequence[ScoredWindow], nats: Tensor, group_of: GroupOf) -> int:
        """Add the losses of windows; return the number of bytes that they score.

        Args:
            windows: the windows.
            nats: (rows, T) losses, one row for each window.
            group_of: maps a document's key to its group.

        Raises:
            EvaluationError: a loss is not finite, or too high.
        """
        added = 0
        for window, row in zip(windows, nats.numpy(), strict=True):
            try:
                losses = in_units(row[window.context : len(window.ids)])
            except ValueError as error:
                raise EvaluationError(f"the model's loss in {window.key} is not a usable number: {error}") from error
            score = Score(int(losses.sum()), len(losses), int(window.begins_document))
            self.groups.setdefault(group_of(window.key), Score()).add(score)
            self.positions.add(window.context, losses)
            if window.modality == "audio":
                for place, name in enumerate(SAMPLE_BYTES):
                    own = losses[(place - window.offset - window.context) % len(SAMPLE_BYTES) :: len(SAMPLE_BYTES)]
                    self.sample_bytes.setdefault(name, Score()).add(Score(int(own.sum()), len(own)))
            added += len(losses)
        return added
