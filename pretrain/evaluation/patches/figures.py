"""Figures of the patches of a text: sizes, agreement with marks of the text, surprisal at starts."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.evaluation.patches.finding import PatchedText, patches_of_rule
from pretrain.models.patching.rules import ByteClass

WHITESPACE = b" \t\n\r\v\f"
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 33, 65)
"""Smallest sizes of the classes of the distribution, in bytes."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """Agreement of starts with places of a text. A share is NaN if there is nothing to count."""

    precision: float
    """Share of the starts that are such places."""
    chance_of_precision: float
    """The same for starts anywhere: the share of such places in the text."""
    recall: float
    """Share of the places at which a patch starts."""
    chance_of_recall: float
    """The same for as many starts anywhere: the share of starts in the text."""


@dataclass(frozen=True)
class StageFigures:
    """Figures of the patches of a stage. Byte 0 always starts a patch, so agreements do not count it."""

    patches: int
    bytes_per_patch: float
    """Mean."""
    deviation: float
    """Standard deviation of the bytes of a patch."""
    median: float
    longest: int
    sizes: dict[str, int]
    """Patches by their bytes."""
    exact: dict[str, Agreement]
    """Agreement by the kind of places; see `places_of`."""
    near: dict[str, Agreement]
    """The same, where a neighbouring byte counts too."""
    enrichment: float | None
    """Mean bits of the bytes before which patches start, divided by the mean of all (arXiv:2601.22805). None without a
    model."""
    full_windows: float | None
    """Share of windows with more patches than the model's capacity. None without a model."""

    def as_json(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        return asdict(self)


def figures_of(text: PatchedText) -> dict[str, StageFigures]:
    """Return the figures of a text by stage."""
    places = places_of(text.data)
    return {stage: _figures(text, stage, places) for stage in text.starts}


def places_of(data: bytes) -> dict[str, Mask]:
    """Return places of a text by kind: for each byte, whether the place right before it is one.

    Kinds are the places after each byte of whitespace, before each UTF-8 character, and where SpaceByte's rule starts
    patches.
    """
    content = np.frombuffer(data, np.uint8)
    return {
        "whitespace": np.concatenate([[False], np.isin(content[:-1], np.frombuffer(WHITESPACE, np.uint8))]),
        "characters": (content & 0xC0) != 0x80,
        "byte classes": patches_of_rule(ByteClass(len(data)), data).starts["0"],
    }


def agreement(starts: Mask, places: Mask) -> tuple[Agreement, Agreement]:
    """Return the agreement of starts with places of a text: exact, and where a neighbouring byte counts too."""
    starts, places = starts[1:], places[1:]
    wide_starts, wide_places = _widened(starts), _widened(places)
    return (
        Agreement(_mean(places[starts]), _mean(places), _mean(starts[places]), _mean(starts)),
        Agreement(_mean(wide_places[starts]), _mean(wide_places), _mean(wide_starts[places]), _mean(wide_starts)),
    )


def _figures(text: PatchedText, stage: str, places: Mapping[str, Mask]) -> StageFigures:
    starts = text.starts[stage]
    sizes = np.diff(np.append(starts.nonzero()[0], len(starts)))
    agreements = {kind: agreement(starts, own) for kind, own in places.items()}
    return StageFigures(
        patches=len(sizes),
        bytes_per_patch=_mean(sizes),
        deviation=float(sizes.std()),
        median=float(np.median(sizes)),
        longest=int(sizes.max()),
        sizes=_by_class(sizes),
        exact={kind: exact for kind, (exact, _) in agreements.items()},
        near={kind: near for kind, (_, near) in agreements.items()},
        enrichment=None if text.bits is None else _mean(text.bits[starts]) / _mean(text.bits),
        full_windows=text.full_windows[stage] / text.windows if stage in text.full_windows else None,
    )


def _by_class(sizes: NDArray[np.int64]) -> dict[str, int]:
    """Return the number of patches by class of size."""
    ends = [first - 1 for first in SIZES[1:]]
    names = [str(first) if first == last else f"{first}-{last}" for first, last in zip(SIZES, ends, strict=False)]
    counts = np.bincount(np.searchsorted(SIZES, sizes, side="right") - 1, minlength=len(SIZES))
    return dict(zip([*names, f"{SIZES[-1]} and more"], counts.tolist(), strict=True))


def _widened(mask: Mask) -> Mask:
    """Return a mask that is also true beside each true value."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    wide[:-1] |= mask[1:]
    return wide


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else math.nan
