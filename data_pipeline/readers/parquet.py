"""Parquet: each row of a column of text or binary values is a document."""

from collections.abc import Iterator
from typing import BinaryIO

from byteloom.core.packages import needed_by
from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.streams import seekable
from data_pipeline.readers.text import document_in_memory
from data_pipeline.sources.opening import open_file
from data_pipeline.sources.source_file import Skipped, SourceFile

with needed_by("a Parquet file", "pyarrow"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

BATCH_ROWS = 64
"""Rows in memory at once, beside the page of the file that they are in."""


def documents_in_parquet(file: SourceFile, options: ReadOptions) -> Iterator[Document | Skipped]:
    """A document, or why there is none, for each row.

    Raises:
        BadDocumentError: the file cannot be read, or not further, or has no such column of text or binary values.
    """
    with open_file(file.url) as stream, seekable(stream) as source:
        row = 0
        for column in _columns(source, options.field, file.url):
            modality = options.modality or ("binary" if _is_binary(column.type) else "text")
            for content in column.cast(pa.large_binary()).to_pylist():
                key = f"{file.key}#{row:09d}"
                if content:
                    yield document_in_memory(key, modality, content)
                else:
                    reason, what = ("no field", "null") if content is None else ("empty", "empty")
                    yield Skipped(key, reason, f"row {row + 1:,} of {file.url}: its {options.field!r} is {what}")
                row += 1


def _columns(source: BinaryIO, field: str, name: str) -> Iterator[pa.Array]:
    """The column of a file, a few rows at a time."""
    try:
        # Without pre_buffer and with a buffer, row groups are not held in memory.
        file = pq.ParquetFile(source, buffer_size=READ_BYTES, pre_buffer=False)
        paths = [file.schema.column(i).path for i in range(len(file.schema))]
        if field not in paths:
            raise BadDocumentError(f"{name} has no column {field!r}; it has {', '.join(paths)}")
        for batch in file.iter_batches(BATCH_ROWS, columns=[field]):
            column = batch.column(0)
            if field not in batch.schema.names:
                column = pc.struct_field(column, field.split(".")[1:])
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            if not (_is_binary(column.type) or _is_text(column.type)):
                raise BadDocumentError(
                    f"{name}: its column {field!r} has type {column.type}, which is not text or binary"
                )
            yield column
    except (pa.ArrowException, OSError) as error:
        raise BadDocumentError(f"cannot read {name}: {str(error).partition(chr(10))[0]}") from error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )
