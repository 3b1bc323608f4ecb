"""Storage of a corpus: a folder of this machine, or any URL that fsspec opens.

    Folder    ◀─ files opened once, read by range
    Remote    ◀─ spans in memory ◀─ spans on the local disk ◀─ range requests, repeated until they are complete

Storage does not know which bytes are right. A caller that finds wrong bytes asks for them again with `fresh`.
"""

from pathlib import Path
from typing import Protocol

from data_pipeline.corpus.storage.folder import Folder
from data_pipeline.corpus.storage.remote import Remote, RemoteConfig


class Storage(Protocol):
    """Files of one corpus, by name. Many threads may use it at once."""

    location: str
    """Folder or URL of the corpus, for messages."""
    rereads: int
    """Times that a caller should ask for bytes that turn out to be wrong, the first time included."""
    local_folder: Path | None
    """Folder of this machine that holds the files; None for a URL."""

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Return bytes begin … end - 1 of a file, all of them.

        Args:
            name: name of the file.
            begin: offset of the first byte.
            end: offset after the last byte.

        Raises:
            CorruptBlockError: the disk fails to read them, though the file is there.
            CorpusError: the file cannot be read.
        """

    def read_ahead(self, name: str, begin: int, end: int, span_end: int, fresh: bool) -> bytes:
        """Return bytes begin … end - 1 of a file, and prepare to read the bytes up to span_end - 1 soon.

        Args:
            name: name of the file.
            begin: offset of the first byte.
            end: offset after the last byte.
            span_end: offset after the last byte that is needed soon.
            fresh: read the file itself, not a cache.

        Raises:
            CorruptBlockError: the disk fails to read them, though the file is there.
            CorpusError: the file cannot be read.
        """

    def read_small(self, name: str) -> bytes:
        """Return a whole file that fits into memory.

        Raises:
            MissingFileError: there is no such file.
            ForbiddenError: the file may not be read.
            CorpusError: the file cannot be read.
        """

    def read_index(self, name: str, size: int, digest: str, fresh: bool) -> bytes | bytearray:
        """Return an index file. The content is not verified, and may have another length.

        Args:
            name: name of the file.
            size: size of the file in bytes.
            digest: digest of its content, which names it in a cache.
            fresh: read the file itself, not a cache.

        Raises:
            CorpusError: the file cannot be read.
        """

    def identify(self, digest: str) -> None:
        """Set the digest of the corpus, which separates corpora in a cache. Call it before reading blocks."""

    def check_presence(self) -> None:
        """Check that there is a manifest, if that is cheap to know.

        Raises:
            CorpusError: there is none; the message says how to make one.
        """

    def check_size(self, name: str, size: int) -> None:
        """Check the size of a file, if that is cheap to know.

        Raises:
            CorpusError: the file is missing or has another size.
        """

    def shard_files(self) -> list[Path]:
        """Return all files that are named like a shard or a part of one, sorted; none for a URL."""

    def close(self) -> None:
        """Close all files. Requests that are under way end with a CorpusError."""


def open_storage(location: str | Path, config: RemoteConfig) -> Storage:
    """Return the storage of a folder or of a URL.

    Raises:
        CorpusError: URLs of this kind cannot be opened.
        MissingPackageError: the package that opens them is not installed.
    """
    return Remote(str(location), config) if "://" in str(location) else Folder(Path(location))
