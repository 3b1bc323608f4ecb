"""Readers: from files to documents.

    SourceFile ─▶ is_container? ─ no ─▶ document_of ──▶ Document                 text, code, image, sound, any bytes
                              └── yes ▶ documents_in ─▶ Document | Skipped, …    lines, Parquet, tar, WebDataset

Whatever a reader raises becomes a BadDocumentError of the document or container; see `boundary`.
Each reader is one file here, or in another package; see `registry`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from byteloom.core.storage.urls import is_url
from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.readers.boundary import guarded
from data_pipeline.readers.content import refuse_other_kind, settle_modality
from data_pipeline.readers.formats.text import is_binary
from data_pipeline.readers.formats.whole import read_whole
from data_pipeline.readers.kinds import container_of, modality_of, reader_of
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import Reader, own_readers
from data_pipeline.sources.opening import open_file, read_small
from data_pipeline.sources.roots import refuse_changed
from data_pipeline.sources.source_file import LeftOutError, Skipped, SourceFile, skipped

__all__ = ["ReadOptions", "document_of", "documents_in", "is_container", "size_of"]


def is_container(file: SourceFile, options: ReadOptions) -> bool:
    """Return whether a file holds many documents rather than being one."""
    return container_of(file, options) is not None


def document_of(file: SourceFile, options: ReadOptions) -> Document:
    """Return the document that a file is. The file is opened when the document is read.

    At the end, reading checks that a file of this machine is still the one that was listed.
    """
    size = size_of(file, options)
    document = Document(file.key, modality_of(file.key, options), lambda: _read(document, file, size, options))
    return document


def size_of(file: SourceFile, options: ReadOptions) -> int | None:
    """Return the size of the document that a file is; None if only reading it shows the size."""
    reader, is_compressed = reader_of(file.key, options)
    return file.size if reader.name == "files" and not is_compressed else None


def _read(document: Document, file: SourceFile, size: int | None, options: ReadOptions) -> Iterator[bytes]:
    if size is not None and size <= READ_BYTES:
        content = read_small(file)
        if content is not None and not (options.skip_binary and is_binary(content, is_all=True)):
            settle_modality(document, content, file.url, options)
            return iter((content,))
    return _read_stream(document, file, options)


def _read_stream(document: Document, file: SourceFile, options: ReadOptions) -> Iterator[bytes]:
    reader, is_compressed = reader_of(file.key, options)
    with open_file(file.url, buffered=is_compressed or reader.name != "files") as stream:
        yield from read_whole(stream, document, file.url, file.size, options)
    if not is_url(file.url):  # at a URL, this would be another request for each file
        refuse_changed(file)


def documents_in(file: SourceFile, options: ReadOptions) -> Iterator[Document | Skipped]:
    """Return the documents of a container, in its order, in one pass and bounded memory.

    A member of a tar can be read, any number of times, until the next document is requested. Others can be kept.

    Raises:
        BadDocumentError: the container cannot be read, or not further; documents yielded before are complete.
    """
    reader = container_of(file, options)
    if reader is None or reader.read_container is None:
        raise ValueError(f"{file.key} is one document, not a container of several")
    found = guarded(reader.read_container(file, options), file.url)
    is_own = own_readers().get(reader.name) is reader
    return found if is_own and options.kinds is None else _checked(found, reader, is_own, file, options)


def _checked(
    found: Iterator[Document | Skipped], reader: Reader, is_own: bool, file: SourceFile, options: ReadOptions
) -> Iterator[Document | Skipped]:
    """Leave out documents of other kinds, and guard the reading of documents by readers of other packages."""
    for each in found:
        if isinstance(each, Skipped) or reader.name == "tar":  # its members are checked when they are read
            yield each
            continue
        try:
            refuse_other_kind(each, f"a document of {file.url}", options)
        except LeftOutError as error:
            yield skipped(each.key, error)
        else:
            yield each if is_own else replace(each, read=partial(_guarded_read, each, file))


def _guarded_read(document: Document, file: SourceFile) -> Iterator[bytes]:
    yield from guarded(document.read(), f"{document.key} of {file.url}")
