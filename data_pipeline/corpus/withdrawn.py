"""List of documents that were withdrawn from a corpus after it was written. `withdraw` adds to it.

    corpus/withdrawn.json    {"format": …, "content_sha256": of the corpus, "entries": [[key, block, start, stop], …],
                              "sha256": of the other fields}

The list only grows, and each change replaces the whole file. A run masks the entries from the moment it knows them. It
records how many entries it knew and their digest. A later run can then tell what was read, and notices lost entries.
The shards keep the bytes. To erase the bytes, prepare the corpus again.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from byteloom.core.storage.files import replace_file
from data_pipeline.corpus.storage.storage import Storage
from data_pipeline.errors import CorpusError, DamagedCorpusError, ForbiddenError, MissingFileError

WITHDRAWN_FILE = "withdrawn.json"
LIST_FORMAT = "byteloom-withdrawn/2"


class Withdrawal(NamedTuple):
    """A range of a block's content that must not be read: a document's bytes there, and the byte after its end."""

    key: str
    """Key of the document."""
    block: int
    """Number of the block."""
    start: int
    """Offset of the first byte in the content."""
    stop: int
    """Offset after the last byte."""


def read_withdrawn(storage: Storage, content_sha256: str | None, lengths: NDArray[np.void] | None) -> list[Withdrawal]:
    """Return the list of a corpus; it is empty if there is no file.

    Args:
        storage: files of the corpus.
        content_sha256: identity of the corpus that the list must have; None accepts any.
        lengths: (blocks,) LENGTHS, in which the entries must fit; None accepts any.

    Raises:
        CorpusError: the list cannot be read, is damaged, or belongs to another corpus.
    """
    path = f"{storage.location}/{WITHDRAWN_FILE}"
    for attempt in range(1, storage.rereads + 1):
        try:
            return _parsed(storage.read_small(WITHDRAWN_FILE), content_sha256, lengths)
        except MissingFileError:
            return []
        except ForbiddenError as error:
            raise CorpusError(
                f"{error}. S3 gives the same answer for a missing file if listing is forbidden. Permit s3:ListBucket, "
                "or make an empty list with byteloom withdraw --list /dev/null, and copy it there"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            if attempt == storage.rereads:
                raise DamagedCorpusError(
                    f"{path} is damaged: {error}. "
                    "Restore it from a copy, or from a mirror with byteloom verify --repair"
                ) from error
    raise AssertionError("the last attempt returns or raises")


def prefix_digest(entries: Sequence[Withdrawal], count: int) -> str:
    """Return the sha256 of the first `count` entries of a list, in hexadecimal."""
    return hashlib.sha256(json.dumps(entries[:count]).encode()).hexdigest()


def write_withdrawn(folder: Path, content_sha256: str, entries: Sequence[Withdrawal]) -> None:
    """Replace the list of a corpus on this machine. The caller holds `only_writer` of the folder."""
    replace_file(folder / WITHDRAWN_FILE, _text(content_sha256, entries))


def _parsed(content: bytes, content_sha256: str | None, lengths: NDArray[np.void] | None) -> list[Withdrawal]:
    """Return the entries of a file.

    Raises:
        ValueError: the file is damaged, or belongs to another corpus. TypeError and KeyError mean the same.
    """
    fields: dict[str, Any] = json.loads(content.decode())
    if fields["format"] != LIST_FORMAT:
        raise ValueError(f"it has format {fields['format']!r}; this version reads {LIST_FORMAT!r}")
    entries = [Withdrawal(*entry) for entry in fields["entries"]]
    if content.decode() != _text(fields["content_sha256"], entries):
        raise ValueError("its bytes are not those that were written")
    if content_sha256 is not None and fields["content_sha256"] != content_sha256:
        raise ValueError(f"it is the list of another corpus, with content sha256 {fields['content_sha256']}")
    if lengths is not None:
        for entry in entries:
            size = 0
            if 0 <= entry.block < len(lengths):
                size = int(lengths[entry.block]["raw_bytes"]) + int(lengths[entry.block]["document_ends"])
            if not 0 <= entry.start < entry.stop <= size:
                raise ValueError(f"{entry} is not inside a block")
    return entries


def _text(content_sha256: str, entries: Sequence[Withdrawal]) -> str:
    fields = {"format": LIST_FORMAT, "content_sha256": content_sha256, "entries": entries}
    return json.dumps({**fields, "sha256": hashlib.sha256(json.dumps(fields).encode()).hexdigest()}) + "\n"
