"""The list of documents that were taken out of a corpus after it was written. See withdraw.py.

    corpus/withdrawn.json    {"format": …, "content_sha256": of the corpus, "entries": [[key, block, start, stop], …],
                              "sha256": of the other fields}

The list only grows, and is replaced whole. A run masks what is on it from where it learned of it, and records how many
entries it knew and their digest, so what was read before can still be told, and a list that lost an entry is noticed.
The shards keep the bytes: whoever must erase them prepares the corpus anew.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from byteloom.core.files import replace_file
from data_pipeline.corpus.storage import Storage
from data_pipeline.errors import CorpusError, ForbiddenError, MissingFileError

FILE = "withdrawn.json"
FORMAT = "byteloom-withdrawn/2"


class Withdrawal(NamedTuple):
    """A range of one block's content that is not to be read: what it holds of a document, with what follows its end."""

    key: str
    """Of the document."""
    block: int
    start: int
    stop: int


def read_withdrawn(storage: Storage, content_sha256: str | None, lengths: NDArray[np.void] | None) -> list[Withdrawal]:
    """The list of a corpus; empty where there is none.

    Args:
        content_sha256, lengths: of the corpus. The list is not held against what is None.

    Raises:
        CorpusError: it cannot be read, is damaged, or is the list of another corpus.
    """
    path = f"{storage.location}/{FILE}"
    for attempt in range(1, storage.rereads + 1):
        try:
            return _parsed(storage.read_small(FILE), content_sha256, lengths)
        except MissingFileError:
            return []
        except ForbiddenError as error:
            raise CorpusError(
                f"{error}. S3 gives the same answer for a missing file if listing is forbidden. Permit s3:ListBucket, "
                "or make an empty list with byteloom withdraw --list /dev/null, and copy it there"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            if attempt == storage.rereads:
                raise CorpusError(
                    f"{path} is damaged: {error}. "
                    "Restore it from a copy, or from a mirror with byteloom verify --repair"
                ) from error
    raise AssertionError("a last attempt returns or raises")


def prefix_digest(entries: Sequence[Withdrawal], count: int) -> str:
    """The sha256 of the first `count` entries of a list, by which they are known again."""
    return hashlib.sha256(json.dumps(entries[:count]).encode()).hexdigest()


def write_withdrawn(folder: Path, content_sha256: str, entries: Sequence[Withdrawal]) -> None:
    """Replaces the list of a corpus on this machine, whose folder the caller keeps others out of."""
    replace_file(folder / FILE, _text(content_sha256, entries))


def _parsed(content: bytes, content_sha256: str | None, lengths: NDArray[np.void] | None) -> list[Withdrawal]:
    """The entries of a file; a ValueError, TypeError or KeyError where it is not, to the byte, the corpus's."""
    fields: dict[str, Any] = json.loads(content.decode())
    if fields["format"] != FORMAT:
        raise ValueError(f"it has format {fields['format']!r}; this version reads {FORMAT!r}")
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
    fields = {"format": FORMAT, "content_sha256": content_sha256, "entries": entries}
    return json.dumps({**fields, "sha256": hashlib.sha256(json.dumps(fields).encode()).hexdigest()}) + "\n"
