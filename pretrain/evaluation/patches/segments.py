"""Patches of a text as pieces that can be shown: whole characters, with what starts before each piece."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pretrain.evaluation.patches.finding import PatchedText
from pretrain.evaluation.surprise import visible

LONGEST_CHARACTER = 4
"""Most bytes of a UTF-8 character."""


class Segment(NamedTuple):
    """A patch of stage 0, or several if they start within one character."""

    text: str
    """How it is shown."""
    stages: int
    """Number of stages that start a patch here; 0 only at the beginning of a text."""
    first: int
    """Number of its first byte in the text."""
    size: int
    """Number of its bytes."""
    bits: float | None
    """Mean bits of its bytes; None without a model."""


def segments_of(text: PatchedText, most: int) -> Iterator[Segment]:
    """Yield the segments of the first bytes of a text, in order.

    A patch that starts within a character is shown before it.

    Args:
        text: a text with its patches.
        most: bytes to show.
    """
    for _ in range(LONGEST_CHARACTER - 1):
        if 0 < most < len(text.data) and text.data[most] & 0xC0 == 0x80:
            most -= 1
    levels = np.sum([mask[:most] for mask in text.starts.values()], axis=0).tolist()
    shown, first, stages = list[str](), 0, 0
    begin = 0
    for character in text.data[:most].decode("utf-8", "surrogateescape"):
        end = begin + len(character.encode("utf-8", "surrogateescape"))
        if level := max(levels[begin:end]):
            if shown:
                yield _segment(text, "".join(shown), stages, first, begin)
            shown, first, stages = [], begin, level
        shown.append(visible(character))
        begin = end
    if shown:
        yield _segment(text, "".join(shown), stages, first, begin)


def _segment(text: PatchedText, shown: str, stages: int, first: int, end: int) -> Segment:
    bits = None if text.bits is None else float(text.bits[first:end].mean())
    return Segment(shown, stages, first, end - first, bits)
