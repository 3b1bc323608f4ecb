"""Registry of readers. A reader is one file, which registers itself.

    READER = register_reader(Reader("subtitles", "Dialogue of subtitle files.", read_file=read_subtitles))

Byteloom's own readers are the modules of this folder. Other packages name a module in the entry point group
`byteloom.readers`; importing it registers the reader, which `--reader NAME` then chooses:

    [project.entry-points."byteloom.readers"]
    subtitles = "their_package.subtitles"

`--reader auto` chooses among Byteloom's own readers by suffix, so that installing a package changes no corpus.
Modules of readers import libraries of media when they read a file, because all modules are imported to list readers.
"""

import importlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, BinaryIO

from byteloom.core.registries.registry import Registry, RegistryError, own_modules
from data_pipeline.documents import Document
from data_pipeline.errors import CorpusError
from data_pipeline.media import MediaCard
from data_pipeline.sources.source_file import Skipped, SourceFile

if TYPE_CHECKING:
    from data_pipeline.readers.options import ReadOptions

READERS_PACKAGE = "data_pipeline.readers.formats"

MediaPieces = Generator[bytes, None, MediaCard]
"""Pieces of a decoded document, and then the layout of its bytes."""


@dataclass(frozen=True)
class Reader:
    """A reader, as its file declares it. It reads either single documents or containers of many."""

    name: str
    """Value of `--reader`; unique."""
    summary: str
    """Description of the files that it reads, in one line."""
    read_file: "Callable[[BinaryIO, str, ReadOptions], Iterator[bytes] | MediaPieces] | None" = None
    """Function that yields the document in a stream. Its arguments are the stream, a name for errors, and the options.
    It raises BadDocumentError for a stream that it cannot read. A generator may return the document's MediaCard."""
    read_container: "Callable[[SourceFile, ReadOptions], Iterator[Document | Skipped]] | None" = None
    """Function that yields the documents of a container in its order, in one pass and bounded memory. Their keys are
    the container's with `/NAME`, or with `#` and a number of nine digits or more that grows. It raises BadDocumentError
    if the container cannot be read, or not further."""
    options: frozenset[str] = frozenset()
    """Fields of ReadOptions that it uses, besides `modality`. Others are refused."""
    suffixes: frozenset[str] = frozenset()
    """Suffixes of the files that `--reader auto` gives to one of Byteloom's own readers."""
    modality: str | None = None
    """Modality of its documents; None decides by suffix."""
    in_tars: bool = True
    """Whether it reads the members of a tar, if it reads single documents and the source is a tar."""
    compressed: bool = True
    """Whether `--reader auto` gives it containers that are compressed with gzip or zstd."""


_registry = Registry[Reader]("reader", "byteloom.readers", READERS_PACKAGE)


def register_reader(reader: Reader) -> Reader:
    """Add a reader, and return it.

    Raises:
        RegistryError: the name is taken.
        ValueError: the reader declares none of its two functions, or both.
    """
    if (reader.read_file is None) == (reader.read_container is None):
        raise ValueError(f"the reader {reader.name} must have either read_file or read_container")
    _registry.register(reader.name, reader)
    return reader


def reader_named(name: str) -> Reader:
    """Return a reader.

    Raises:
        CorpusError: there is no reader of this name, or its entry point cannot be used.
    """
    try:
        return _registry.get(name)
    except RegistryError as error:
        raise CorpusError(str(error)) from error


def reader_names() -> list[str]:
    """Return the names of all readers, Byteloom's own first. Modules of other packages are not imported."""
    return _registry.names()


@cache
def own_readers() -> dict[str, Reader]:
    """Return Byteloom's own readers by name."""
    readers = dict[str, Reader]()
    for module in own_modules(READERS_PACKAGE):
        found = vars(importlib.import_module(module)).values()
        readers |= {reader.name: reader for reader in found if isinstance(reader, Reader)}
    return readers


def own_reader_of(suffix: str) -> Reader | None:
    """Return Byteloom's own reader of files with a suffix; None if there is none."""
    return _by_suffix().get(suffix)


@cache
def _by_suffix() -> dict[str, Reader]:
    found = [(suffix, reader) for reader in own_readers().values() for suffix in reader.suffixes]
    readers = dict(found)
    assert len(readers) == len(found), "two readers have the same suffix"
    return readers
