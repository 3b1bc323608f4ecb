"""Reader of Parquet: each row of a column of text or binary values is a document."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from byteloom.core.packages import needed_by
from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import Reader, register_reader
from data_pipeline.readers.streams import seekable
from data_pipeline.readers.text import document_in_memory
from data_pipeline.sources.opening import open_file
from data_pipeline.sources.source_file import Skipped, SourceFile

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 64
"""Rows in memory at once, besides the page of the file that they are in."""


def documents_in_parquet(file: SourceFile, options: ReadOptions) -> Iterator[Document | Skipped]:
    """Yield a document, or the reason why there is none, for each row.

    Args:
        file: the file.
        options: which column is the document.

    Raises:
        BadDocumentError: the file cannot be read, or not further, or has no such column of text or binary values.
    """
    with needed_by("a Parquet file", "pyarrow"):
        import pyarrow as pa  # noqa: PLC0415 - Arrow takes long to import

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


PARQUET_READER = register_reader(
    Reader(
        "parquet",
        "Rows of a column of Parquet files.",
        read_container=documents_in_parquet,
        options=frozenset({"field"}),
        suffixes=frozenset({".parquet"}),
        compressed=False,  # Parquet compresses its columns itself
    )
)


def _columns(source: BinaryIO, field: str, name: str) -> "Iterator[pa.Array]":
    """Yield the column of a file, a few rows at a time."""
    import pyarrow as pa  # noqa: PLC0415 - Arrow takes long to import
    import pyarrow.compute as pc  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        # With a buffer and without pre_buffer, Arrow does not hold row groups in memory.
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


def _is_text(kind: "pa.DataType") -> bool:
    from pyarrow import types  # noqa: PLC0415 - Arrow takes long to import

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_binary(kind: "pa.DataType") -> bool:
    from pyarrow import types  # noqa: PLC0415 - Arrow takes long to import

    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )
