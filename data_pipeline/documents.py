"""Document, the unit of a corpus."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

READ_BYTES = 1 << 20
"""Approximate size of the pieces in which documents are read. A document may be larger than memory."""

MODALITIES = ("text", "code", "image", "audio", "binary")
"""Kinds of bytes. A block has one bit for each kind that it holds, in this order."""


class Document(NamedTuple):
    """Sequence of bytes that a model reads as one: a file, a line, a row, an image."""

    key: str
    """Unique name in the corpus, with '/' between parts."""
    modality: str
    """One of MODALITIES."""
    read: Callable[[], Iterator[bytes]]
    """Function that yields the document in pieces, from its start at each call. It raises BadDocumentError."""
