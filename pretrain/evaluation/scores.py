"""Sums of nats that do not depend on how they are split.

Prices are added as whole multiples of 2^-32 nats. So the sums over groups, over positions and over bytes of samples are
the same number, to the last bit, in whatever order they are taken.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pretrain.evaluation.windows import ScoredWindow

UNITS_PER_NAT = 2**32
HIGHEST_PRICE = 2.0**20
"""Nats of a byte that are taken for a price; more, or no number, is a fault."""

SAMPLE_BYTES = ("low byte", "high byte")
"""The bytes of a sample of sound, in order."""

GroupOf = Callable[[str], str]
"""A document's key to the group it belongs to."""

Units = NDArray[np.int64]


def in_units(nats: NDArray[np.floating]) -> Units:
    """Prices of bytes as whole numbers.

    Raises:
        ValueError: one is not finite, or too high to be one.
    """
    good = np.abs(nats) < HIGHEST_PRICE
    if not good.all():
        raise ValueError(f"{nats[~good][0]} nats for one byte")
    return np.rint(nats.astype(np.float64) * UNITS_PER_NAT).astype(np.int64)


@dataclass
class Score:
    """Sums over bytes."""

    units: int = 0
    """Nats, times UNITS_PER_NAT."""
    bytes: int = 0
    documents: int = 0

    @property
    def nats(self) -> float:
        return self.units / UNITS_PER_NAT

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)

    def word_perplexity(self, words: int) -> float:
        """That of the bytes taken as so many words: two to the bits per byte times the bytes per word."""
        nats_per_word = self.nats / words
        return math.exp(nats_per_word) if nats_per_word < math.log(1e300) else math.inf

    def add(self, other: "Score") -> None:
        self.units += other.units
        self.bytes += other.bytes
        self.documents += other.documents


class Curve:
    """Scores by position, from 0 on."""

    def __init__(self) -> None:
        self._units, self._bytes = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, first: int, units: Units) -> None:
        """Takes up the prices of the bytes at positions from `first` on."""
        end = first + len(units)
        missing = end - len(self._units)
        if missing > 0:
            self._units, self._bytes = np.pad(self._units, (0, missing)), np.pad(self._bytes, (0, missing))
        self._units[first:end] += units
        self._bytes[first:end] += 1

    def scores(self, period: int | None = None) -> list[Score]:
        """Of every position; with a period, of every remainder of positions by it, such as the place in a patch."""
        period = period or len(self._units)
        # Summed as Python's integers, which have no largest.
        return [
            Score(sum(self._units[place::period].tolist()), sum(self._bytes[place::period].tolist()))
            for place in range(min(period, len(self._units)))
        ]


class EvaluationError(Exception):
    """A model cannot be evaluated as asked."""


@dataclass
class Evaluation:
    """Every byte's price, summed in several ways. All add up to the same total."""

    groups: dict[str, Score] = field(default_factory=dict)
    positions: Curve = field(default_factory=Curve)
    """By position in the window: how many bytes before it the window holds."""
    sample_bytes: dict[str, Score] = field(default_factory=dict)
    """Of sound alone, which is 16-bit little-endian PCM: by SAMPLE_BYTES."""

    @property
    def total(self) -> Score:
        total = Score()
        for score in self.groups.values():
            total.add(score)
        return total

    def add(self, windows: Sequence[ScoredWindow], nats: Tensor, group_of: GroupOf) -> int:
        """Adds the (rows, T) nats of some windows; returns the bytes that these scored.

        Raises:
            EvaluationError: one of them is no price.
        """
        added = 0
        for window, row in zip(windows, nats.numpy(), strict=True):
            try:
                prices = in_units(row[window.context : len(window.ids)])
            except ValueError as error:
                raise EvaluationError(f"the model's loss in {window.key} is not a usable number: {error}") from error
            score = Score(int(prices.sum()), len(prices), int(window.begins_document))
            self.groups.setdefault(group_of(window.key), Score()).add(score)
            self.positions.add(window.context, prices)
            if window.modality == "audio":
                for place, name in enumerate(SAMPLE_BYTES):
                    own = prices[(place - window.offset - window.context) % len(SAMPLE_BYTES) :: len(SAMPLE_BYTES)]
                    self.sample_bytes.setdefault(name, Score()).add(Score(int(own.sum()), len(own)))
            added += len(prices)
        return added
