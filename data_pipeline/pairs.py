"""Pairs of a source and a target as one document: the border is a length, so both may hold any byte.

    {"source": "abc", "target": "cba"} ─▶ b"3:abc,cba" ─▶ Document ─▶ … ─▶ row ─▶ ids of the source, ids of the target

The source is a netstring (cr.yp.to/proto/netstrings.txt). The target is what follows.
"""

from typing import NamedTuple

import numpy as np

from data_pipeline.errors import CorpusError
from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import PADDING

COLON, COMMA = ord(":"), ord(",")
MOST_DIGITS = 12
"""Most digits of a length."""


class PairIds(NamedTuple):
    """A pair in a row."""

    source: Ids
    """(n,) bytes of the source; those that the row has, if it ends within the source."""
    target: Ids
    """(m,) bytes of the target, and the separator after it, if the row has room."""


def joined(source: bytes, target: bytes) -> bytes:
    """Return a pair as the content of a document."""
    return b"%d:%b,%b" % (len(source), source, target)


def pair_of(row: Ids) -> PairIds:
    """Return the pair in a row that begins with a document. It is empty if a hole begins within the source's length.

    Args:
        row: (T,) bytes, separators and padding.

    Raises:
        CorpusError: the document is no pair.
    """
    row, has_padding = row[: _length(row)], bool((row == PADDING).any())
    head = row[: MOST_DIGITS + 1]
    (colons,) = np.nonzero(head == COLON)
    digits = bytes(head[: colons[0] if len(colons) else len(head)].astype(np.uint8))
    if has_padding and len(row) == len(digits) <= MOST_DIGITS and digits.isdigit():  # a whole document has a separator
        return PairIds(row[:0], row[:0])
    if not len(colons) or not digits.isdigit():
        raise _no_pair(row)
    begin = len(digits) + 1
    end = begin + int(digits)
    if end < len(row) and row[end] != COMMA:
        raise _no_pair(row)
    return PairIds(row[begin:end], row[end + 1 :])


def _length(row: Ids) -> int:
    """Return the number of ids before the first padding."""
    (padding,) = np.nonzero(row == PADDING)
    return int(padding[0]) if len(padding) else len(row)


def _no_pair(row: Ids) -> CorpusError:
    shown = bytes(row[:20].clip(max=255).astype(np.uint8))
    return CorpusError(
        f"a document that begins with {shown!r} is no pair of a source and a target; objective.name conditional "
        "or classification reads a corpus that `byteloom prepare --target-field` wrote, with data.packing document"
    )
