"""Readers: from files to documents.

    SourceFile ─▶ is_container? ─ no ─▶ document_of ──▶ Document                 text, code, image, sound, any bytes
                              └── yes ▶ documents_in ─▶ Document | Skipped, …    lines, Parquet, tar, WebDataset

Each reader is one file here, or in another package; see `registry`.
"""

from collections.abc import Iterator
from functools import partial

from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.readers.kinds import container_of, modality_of, reader_of
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.text import is_binary
from data_pipeline.readers.whole import read_whole
from data_pipeline.sources.opening import open_file, read_small
from data_pipeline.sources.source_file import Skipped, SourceFile

__all__ = ["ReadOptions", "document_of", "documents_in", "is_container", "size_of"]


def is_container(file: SourceFile, options: ReadOptions) -> bool:
    """Return whether a file holds many documents rather than being one."""
    return container_of(file, options) is not None


def document_of(file: SourceFile, options: ReadOptions) -> Document:
    """Return the document that a file is. The file is opened when the document is read."""
    return Document(file.key, modality_of(file.key, options), partial(_read, file, options))


def size_of(file: SourceFile, options: ReadOptions) -> int | None:
    """Return the size of the document that a file is; None if only reading it shows the size."""
    reader, is_compressed = reader_of(file.key, options)
    return file.size if reader.name == "files" and not is_compressed else None


def _read(file: SourceFile, options: ReadOptions) -> Iterator[bytes]:
    size = size_of(file, options)
    if size is not None and size <= READ_BYTES:
        content = read_small(file)
        if content is not None and not (options.skip_binary and is_binary(content, is_all=True)):
            return iter((content,))
    return _read_stream(file, options)


def _read_stream(file: SourceFile, options: ReadOptions) -> Iterator[bytes]:
    reader, is_compressed = reader_of(file.key, options)
    with open_file(file.url, buffered=is_compressed or reader.name != "files") as stream:
        yield from read_whole(stream, file.key, file.url, file.size, options)


def documents_in(file: SourceFile, options: ReadOptions) -> Iterator[Document | Skipped]:
    """Return the documents of a container, in its order, in one pass and bounded memory.

    A member of a tar can be read, any number of times, until the next document is requested. Others can be kept.

    Raises:
        BadDocumentError: the container cannot be read, or not further; documents yielded before are complete.
    """
    reader = container_of(file, options)
    if reader is None or reader.read_container is None:
        raise ValueError(f"{file.key} is one document, not a container of several")
    return reader.read_container(file, options)
