"""Readers: from files to documents.

    SourceFile ─▶ is_container? ─ no ─▶ document_of ──▶ Document                   text, code, image, sound, any bytes
                              └── yes ▶ documents_in ─▶ Document | Skipped, …      lines, JSON lines, Parquet, tar

Readers of media and of Parquet are imported when a file needs them: they take long, and text needs none of them.
"""

from collections.abc import Iterator
from functools import partial

from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.readers.kinds import container_of, modality_of, whole_of
from data_pipeline.readers.lines import documents_in_lines
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.tar import documents_in_tar
from data_pipeline.readers.text import is_binary
from data_pipeline.readers.whole import read_whole
from data_pipeline.sources.opening import open_file, read_small
from data_pipeline.sources.source_file import Skipped, SourceFile

__all__ = ["ReadOptions", "document_of", "documents_in", "is_container", "size_of"]


def is_container(file: SourceFile, options: ReadOptions) -> bool:
    """Whether a file holds many documents rather than being one."""
    return container_of(file.key, options) is not None


def document_of(file: SourceFile, options: ReadOptions) -> Document:
    """The document that a file is. Nothing is opened before it is read."""
    return Document(file.key, modality_of(file.key, options), partial(_read, file, options))


def size_of(file: SourceFile, options: ReadOptions) -> int | None:
    """The bytes of the document that a file is, if it can be read; None if only reading tells."""
    return file.size if whole_of(file.key, options) == "bytes" else None


def _read(file: SourceFile, options: ReadOptions) -> Iterator[bytes]:
    size = size_of(file, options)
    if size is not None and size <= READ_BYTES:
        content = read_small(file)
        if content is not None and not (options.skip_binary and is_binary(content, is_all=True)):
            return iter((content,))
    return _read_stream(file, options)


def _read_stream(file: SourceFile, options: ReadOptions) -> Iterator[bytes]:
    with open_file(file.url, buffered=whole_of(file.key, options) != "bytes") as stream:
        yield from read_whole(stream, file.key, file.url, file.size, options)


def documents_in(file: SourceFile, options: ReadOptions) -> Iterator[Document | Skipped]:
    """The documents that a container holds, in its order, in one pass and bounded memory.

    A member of a tar can be read, any number of times, until the next document is asked for. Others can be kept.

    Raises:
        BadDocumentError: the container cannot be read, or not further; documents yielded before are whole.
    """
    match container_of(file.key, options):
        case "lines":
            return documents_in_lines(file, options, is_json=False)
        case "jsonl":
            return documents_in_lines(file, options, is_json=True)
        case "tar":
            return documents_in_tar(file, options)
        case "parquet":
            from data_pipeline.readers.parquet import documents_in_parquet  # noqa: PLC0415 - Arrow takes long

            return documents_in_parquet(file, options)
    raise ValueError(f"{file.key} is one document, not a container of several")
