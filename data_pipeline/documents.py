"""Documents: what a corpus is made of."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

READ_BYTES = 1 << 20
"""Documents are read in pieces of about this size, so one may be larger than memory."""

MODALITIES = ("text", "code", "image", "audio", "binary")
"""What a document's bytes are. A block says which of them it holds by a bit each, in this order."""


class Document(NamedTuple):
    key: str
    """Unique name in the corpus, with '/' between parts."""
    modality: str
    """One of MODALITIES."""
    read: Callable[[], Iterator[bytes]]
    """The bytes the model is to read, in pieces; each call begins anew. Raises BadDocumentError."""
