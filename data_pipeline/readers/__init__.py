"""Readers: from files to documents.

    SourceFile ─▶ is_container? ─ no ─▶ document_of ──▶ Document                   text, code, image, sound, any bytes
                              └── yes ▶ documents_in ─▶ Document | Skipped, …      lines, JSON lines, Parquet, tar

Readers of media and of Parquet are imported when a file needs them: they take long, and text needs none of them.
"""

from collections.abc import Iterator

from data_pipeline.documents import Document
from data_pipeline.readers.kinds import container_of, modality_of, whole_of
from data_pipeline.readers.lines import documents_in_lines
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.tar import documents_in_tar
from data_pipeline.readers.whole import read_whole
from data_pipeline.sources import Skipped, SourceFile, open_file

__all__ = ["ReadOptions", "document_of", "documents_in", "is_container"]


def is_container(file: SourceFile, options: ReadOptions) -> bool:
    """Whether a file holds many documents rather than being one."""
    return container_of(file.key, options) is not None


def document_of(file: SourceFile, options: ReadOptions) -> Document:
    """The document that a file is. Nothing is opened before it is read."""

    def read() -> Iterator[bytes]:
        with open_file(file.url, buffered=whole_of(file.key, options) != "bytes") as stream:
            yield from read_whole(stream, file.key, file.url, file.size, options)

    return Document(file.key, modality_of(file.key, options), read)


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
    raise ValueError(f"{file.key} is one document")
