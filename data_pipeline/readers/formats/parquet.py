"""Reader of Parquet: each row of a column of text or binary values is a document."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from byteloom.core.packages import needed_by
from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.boundary import check_time, described, is_passed
from data_pipeline.readers.formats.text import document_in_memory
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import Reader, register_reader
from data_pipeline.readers.streams import seekable
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
        import pyarrow  # noqa: F401, PLC0415 - Arrow takes long to import

    with open_file(file.url) as stream, seekable(stream) as source:
        yield from documents_in_columns(_columns(source, options.field, file.url), file, options)


def documents_in_columns(
    columns: "Iterator[pa.Array]", file: SourceFile, options: ReadOptions
) -> Iterator[Document | Skipped]:
    """Yield a document, or the reason why there is none, for each value of a column.

    Args:
        columns: parts of the column, in order.
        file: file that the column is in.
        options: the column's name, and the modality of the documents.
    """
    import pyarrow as pa  # noqa: PLC0415 - Arrow takes long to import

    row = 0
    for column in columns:
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
    import pyarrow.parquet as pq  # noqa: PLC0415 - Arrow takes long to import

    try:
        # With a buffer and without pre_buffer, Arrow does not hold row groups in memory.
        file = pq.ParquetFile(source, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True)
        paths = [file.schema.column(number).path for number in range(len(file.schema))]
        check_column(file.schema_arrow, paths, field, name)
        for batch in file.iter_batches(BATCH_ROWS, columns=[field]):
            check_time()
            yield column_of(batch, field)
    except Exception as error:
        if is_passed(error):
            raise
        raise BadDocumentError(f"cannot read {name}: {described(error)}") from error


def column_of(batch: "pa.RecordBatch", field: str) -> "pa.Array":
    """Return the column at a path of names, as stored and without a dictionary."""
    import pyarrow as pa  # noqa: PLC0415 - Arrow takes long to import
    import pyarrow.compute as pc  # noqa: PLC0415

    first, *names = [field] if field in batch.schema.names else field.split(".")
    column = batch.column(batch.schema.get_field_index(first))
    if names:
        column = pc.struct_field(column, names)
    if isinstance(column.type, pa.BaseExtensionType):  # JSON, UUID
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def check_column(schema: "pa.Schema", paths: Sequence[str], field: str, name: str) -> None:
    """Raise a BadDocumentError if a schema has no column of text or binary values at a path of names.

    Args:
        schema: of the file.
        paths: all columns of the file, for the message.
        field: the path.
        name: of the file.
    """
    import pyarrow as pa  # noqa: PLC0415 - Arrow takes long to import

    shown = ", ".join(paths)
    first, *names = [field] if field in schema.names else field.split(".")
    if schema.get_field_index(first) < 0:
        raise BadDocumentError(f"{name} has no column {field!r}; it has {shown}")
    kind = schema.field(first).type
    for each in names:
        if not pa.types.is_struct(kind) or kind.get_field_index(each) < 0:
            lists = f"; {first!r} has type {kind}, and lists and maps are not supported"
            raise BadDocumentError(
                f"{name} has no column {field!r}{lists if pa.types.is_nested(kind) else ''}; it has {shown}"
            )
        kind = kind.field(each).type
    stored = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    stored = stored.value_type if pa.types.is_dictionary(stored) else stored
    if pa.types.is_nested(stored):
        raise BadDocumentError(f"{name}: its column {field!r} has type {kind}; nested types are not supported")
    if not (_is_binary(stored) or _is_text(stored)):
        raise BadDocumentError(f"{name}: its column {field!r} has type {kind}, which is not text or binary")


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
