"""Reader of Arrow files of the `datasets` library: each row of a column of text or binary values is a document.

`datasets` writes streams of Arrow's IPC format to its cache and by `save_to_disk`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from byteloom.core.packages import needed_by
from data_pipeline.documents import Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers.boundary import check_time, described, is_passed
from data_pipeline.readers.formats.parquet import BATCH_ROWS, check_column, column_of, documents_in_columns
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import Reader, register_reader
from data_pipeline.sources.opening import open_file
from data_pipeline.sources.source_file import Skipped, SourceFile

if TYPE_CHECKING:
    import pyarrow as pa

END = b"\xff\xff\xff\xff\0\0\0\0"
"""Last bytes of a stream of Arrow's IPC format."""


def documents_in_arrow(file: SourceFile, options: ReadOptions) -> Iterator[Document | Skipped]:
    """Yield a document, or the reason why there is none, for each row. One record batch is in memory.

    Args:
        file: a stream of Arrow's IPC format.
        options: which column is the document.

    Raises:
        BadDocumentError: the file cannot be read, or not further, or has no such column of text or binary values.
    """
    with needed_by("an Arrow file", "pyarrow"):
        import pyarrow  # noqa: F401, PLC0415 - Arrow takes long to import

    with open_file(file.url) as stream:
        yield from documents_in_columns(_columns(stream, options.field, file.url), file, options)


ARROW_READER = register_reader(
    Reader(
        "arrow",
        "Rows of a column of Arrow files of the datasets library.",
        read_container=documents_in_arrow,
        options=frozenset({"field"}),
        suffixes=frozenset({".arrow"}),
        compressed=False,  # Arrow compresses its buffers itself
    )
)


def _columns(source: BinaryIO, field: str, name: str) -> "Iterator[pa.Array]":
    """Yield the column of a file, a few rows at a time."""
    import pyarrow as pa  # noqa: PLC0415 - Arrow takes long to import

    stream = _Tailed(source)
    try:
        reader = pa.ipc.open_stream(pa.PythonFile(stream, mode="r"))
        check_column(reader.schema, reader.schema.names, field, name)
        for batch in reader:
            batch.validate(full=True)
            for begin in range(0, batch.num_rows, BATCH_ROWS):
                check_time()
                yield column_of(batch.slice(begin, BATCH_ROWS), field)
        if stream.tail != END or source.read(1):  # Arrow takes the end of the file for the end of the stream
            raise BadDocumentError(f"{name} is cut short, or has more bytes after its end")
    except Exception as error:
        if is_passed(error):
            raise
        raise BadDocumentError(f"cannot read {name}: {described(error)}") from error


class _Tailed:
    """A stream that keeps the last bytes that were read."""

    closed = False

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        piece = self._source.read(size)
        self.tail = (self.tail + piece[-len(END) :])[-len(END) :]
        return piece
