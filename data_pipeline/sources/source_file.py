"""Files of the sources, and the reasons why files and documents are left out."""

from dataclasses import dataclass
from typing import NamedTuple

from data_pipeline.errors import BadDocumentError

REASONS = (
    "empty",
    "unreadable",
    "damaged",
    "binary",
    "no field",
    "no key",
    "link",
    "dangling link",
    "sparse",
    "other kind",
    "duplicate",
    "over the limit",
    "changed",
    "corpus",
)
"""Reasons why files and documents are left out. They are counted by these words."""


class SourceFile(NamedTuple):
    """A file of a source."""

    source: int
    """Number of the source in which it was found, counted from 0."""
    url: str
    """A path, a URL that fsspec opens, or `pipe:` and a command."""
    key: str
    """Unique name among all sources: the source's own name and the path from it, with '/' between parts."""
    size: int | None
    """Bytes as listed; None if they are not known."""
    version: str | None = None
    """Modification time or ETag as listed; None if neither is known."""

    @property
    def identity(self) -> bytes:
        """Key, size and version, as a line."""
        return f"{self.key}\0{self.size}\0{self.version}\n".encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Skipped:
    """A file or document that was left out."""

    key: str
    """Key of the document, or of the file."""
    reason: str
    """One of REASONS."""
    detail: str
    """Description of the problem."""


class LeftOutError(BadDocumentError):
    """A document cannot be read, for one of REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def skipped(key: str, error: BadDocumentError) -> Skipped:
    """Return the entry for a document whose reading raised an error."""
    return Skipped(key, error.reason if isinstance(error, LeftOutError) else "damaged", str(error))
