"""Documents: what a corpus is made of, and where they are found.

A document is a key, a modality and bytes. The bytes are read lazily, in pieces, so a document may be larger than
memory.
"""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import CorpusError

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """One file of a corpus."""

    key: str
    """Unique name in the corpus: the path from the source's parent folder, with '/' between parts."""
    path: Path
    size: int
    """Bytes, as found when the corpus was listed."""
    modality: str = "text"

    def read(self) -> Iterator[bytes]:
        """The document's bytes, in pieces of at most READ_BYTES.

        Raises:
            CorpusError: the file cannot be read, or no longer has the size it had when it was listed.
        """
        seen = 0
        try:
            with self.path.open("rb") as file:
                while piece := file.read(READ_BYTES):
                    seen += len(piece)
                    yield piece
        except OSError as error:
            raise CorpusError(f"cannot read {self.path}: {error.strerror}") from error
        if seen != self.size:
            raise CorpusError(f"{self.path} changed while it was read: {self.size:,} bytes listed, {seen:,} read")


@dataclass(frozen=True)
class Listing:
    """What was found under the sources."""

    documents: list[Document]
    """Sorted by key."""
    empty: int
    """Files without a byte, which are left out."""
    unreadable: list[tuple[Path, str]]
    """Files that cannot be opened, with the reason."""


def find_documents(sources: Sequence[Path], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Listing:
    """Every file of the sources, as documents.

    Args:
        sources: files, or folders that are searched to any depth (links to folders are not followed).
        include: glob patterns; when given, only files whose name or path from the source matches one are taken.
        exclude: glob patterns of names; a file or folder of such a name (or path from the source) is left out.

    Raises:
        CorpusError: a source does not exist, or two files have one key.
    """
    documents: dict[str, Document] = {}
    unreadable: list[tuple[Path, str]] = []
    empty = 0
    for source in sources:
        if not source.exists():
            raise CorpusError(f"no such file or folder: {source}")
        for path in _walk(source, exclude) if source.is_dir() else [source]:
            relative = path.relative_to(source).as_posix() if source.is_dir() else path.name
            if include and not _matches(relative, include):
                continue
            key = f"{source.resolve().name}/{relative}" if source.is_dir() else relative
            if key in documents:
                raise CorpusError(
                    f"{documents[key].path} and {path} both have the key {key!r}; "
                    "prepare them as two corpora, or from a folder above both"
                )
            reason = _why_unreadable(path)
            if reason:
                unreadable.append((path, reason))
            elif size := path.stat().st_size:
                documents[key] = Document(key, path, size)
            else:
                empty += 1
    return Listing([documents[key] for key in sorted(documents)], empty, unreadable)


def _walk(folder: Path, exclude: Sequence[str]) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise CorpusError(f"cannot list {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=stop):
        here = Path(parent)

        def kept(name: str, here: Path = here) -> bool:
            return not _matches((here / name).relative_to(folder).as_posix(), exclude)

        folders[:] = sorted(filter(kept, folders))
        yield from (here / name for name in sorted(filter(kept, files)))


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    name = relative.rsplit("/", 1)[-1]
    return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(relative, p) for p in patterns)


def _why_unreadable(path: Path) -> str | None:
    if path.exists() and not path.is_file():
        return "not a regular file"
    try:
        path.open("rb").close()
    except OSError as error:
        return error.strerror or str(error)
    return None
