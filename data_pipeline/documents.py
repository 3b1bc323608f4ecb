"""Document, the unit of a corpus."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.media import MediaCard

READ_BYTES = 1 << 20
"""Approximate size of the pieces in which documents are read. A document may be larger than memory."""

MODALITIES = ("text", "code", "image", "audio", "binary")
"""Kinds of bytes. A block has one bit for each kind that it holds, in this order."""


@dataclass(slots=True)
class Document:
    """Sequence of bytes that a model reads as one: a file, a line, a row, an image."""

    key: str
    """Unique name in the corpus, with '/' between parts."""
    modality: str
    """One of MODALITIES. Reading the document may correct it by the content."""
    read: Callable[[], Iterator[bytes]]
    """Function that yields the document in pieces, from its start at each call. It raises BadDocumentError."""
    media: MediaCard | None = None
    """Layout of its bytes, if it is decoded media. Known after it was read."""

    @property
    def content(self) -> bytes:
        """All its bytes, in memory."""
        return b"".join(self.read())


class Piece(NamedTuple):
    """Consecutive bytes of a document, as a reader of a corpus meets them."""

    key: str
    """Key of the document."""
    modality: str
    """One of MODALITIES."""
    offset: int
    """Position of the first byte in the document."""
    content: bytes
    ends: bool
    """These bytes end the document."""
