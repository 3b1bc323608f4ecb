"""Keys of documents, unique in a corpus by rule.

    file                            its own key: name of the source, and the path from it
    document of a container         KEY#000000041 (a line, a row) or KEY/NAME (a member), with the container's KEY
    a name that comes again         KEY/NAME#2, KEY/NAME#3 …, in the order of the container
    a file that is named like       x.jsonl#file#000000041 for x.jsonl#000000041 beside x.jsonl; KEY#file/NAME for a
    a document of a container       file below the name of a container, as an object store may have it

FileKeys needs only the names of the files, in order, and ContainerKeys only the names in one container, so nothing
holds all keys of a corpus. A key that no other document could have stays as it is.
"""

import re
import sqlite3
from collections.abc import Iterable
from hashlib import sha256
from itertools import count
from typing import NamedTuple

from data_pipeline.errors import CorpusError

NUMBERED = re.compile(r"#([0-9]{9,})")
"""End of the key of a numbered document, after the key of its container."""
CONTAINED = re.compile(rf"(#file)*(/.*|{NUMBERED.pattern}(#[0-9]+)*)|(#file)+", re.DOTALL)
"""Ends of keys that documents of a container may have, after the key of the container. No file may have such a key."""
NAMES_IN_MEMORY = 1 << 16
"""Largest number of names of a container that are held in memory. More names are kept on disk."""


class _Container(NamedTuple):
    name: str
    key: str


class FileKeys:
    """Keys of the files of a preparation.

    Args:
        single: names of the files that are sources themselves, each with whether it is a container.
    """

    def __init__(self, single: Iterable[tuple[str, bool]] = ()) -> None:
        self._open = list[_Container]()  # containers whose names begin the present one
        self._single = {name: self._next(name, contains) for name, contains in sorted(single)}
        self._open.clear()

    def key_of(self, name: str, contains: bool) -> str:
        """Return the key of a file. The files of each source must be given in the order of their names.

        Args:
            name: name of the source, and the path from it.
            contains: whether the file is a container.
        """
        return self._single[name] if name in self._single else self._next(name, contains)

    def _next(self, name: str, contains: bool) -> str:
        while self._open and not name.startswith(self._open[-1].name):
            self._open.pop()  # in order, the names that begin with another follow it without a gap
        key = name
        for container in reversed(self._open):
            if CONTAINED.fullmatch(name, len(container.name)):
                key = f"{container.key}#file{name[len(container.name) :]}"
                break
        if contains:
            self._open.append(_Container(name, key))
        return key


class ContainerKeys:
    """Keys of the documents of a container.

    Args:
        container: key of the container.
    """

    def __init__(self, container: str) -> None:
        self._container = container
        self._last = -1  # number of the numbered document before
        self._seen = _NameCounts(container)
        self.renamed = 0
        """Number of documents that have another key than their reader gave them."""
        self.example = ""
        """Key of the first of these."""

    def key_of(self, name: str) -> str:
        """Return the key of the next document.

        Args:
            name: key that the reader gave it.

        Raises:
            ValueError: this key is not one that documents of the container have.
        """
        rest = name[len(self._container) :]
        number = NUMBERED.fullmatch(rest)
        if not name.startswith(self._container) or not (number or rest.startswith("/")):
            raise ValueError(
                f"the reader of {self._container} gave a document the key {name!r}; it must be "
                f"{self._container}/NAME, or {self._container}#000000000 with a number that grows"
            )
        if number and int(number[1]) > self._last:
            self._last = int(number[1])
            return name
        times = max(self._seen[name], 1 if number else 0)
        if not times:
            self._seen[name] = 1
            return name
        key, again = next((key, again) for again in count(times + 1) if not self._seen[key := f"{name}#{again}"])
        self._seen[key], self._seen[name] = 1, again
        self.renamed += 1
        self.example = self.example or key
        return key


class _NameCounts:
    """Count of each name in a container. Memory: NAMES_IN_MEMORY names, and a few MB."""

    def __init__(self, container: str) -> None:
        self._container = container
        self._held = dict[str, int]()
        self._stored: sqlite3.Connection | None = None

    def __getitem__(self, name: str) -> int:
        if self._stored is None:
            return self._held.get(name, 0)
        [times] = self._do("SELECT coalesce(max(times), 0) FROM names WHERE name = ?", (_digest(name),))
        return int(times)

    def __setitem__(self, name: str, times: int) -> None:
        if self._stored is not None:
            self._do("REPLACE INTO names VALUES (?, ?)", (_digest(name), times))
            return
        self._held[name] = times
        if len(self._held) > NAMES_IN_MEMORY:
            self._stored = sqlite3.connect("", isolation_level=None)  # a file without a name, which ends with it
            for line in (
                "PRAGMA journal_mode = OFF",
                "CREATE TABLE names (name BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID",
                "BEGIN",
            ):
                self._do(line)
            self._stored.executemany(
                "INSERT INTO names VALUES (?, ?)", ((_digest(n), t) for n, t in self._held.items())
            )
            self._held.clear()

    def _do(self, statement: str, values: tuple[object, ...] = ()) -> tuple[int]:
        assert self._stored is not None, "names are on disk"
        try:
            row: tuple[int] = self._stored.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise CorpusError(
                f"the names in {self._container} cannot be kept in the folder for temporary files: {error}"
            ) from error
        return row


def _digest(name: str) -> bytes:
    return sha256(name.encode("utf-8", "surrogatepass")).digest()[:16]
