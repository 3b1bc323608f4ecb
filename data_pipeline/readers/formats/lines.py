"""Readers of lines: each line is a document, or a JSON object with a field that is one (https://jsonlines.org)."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.pairs import joined
from data_pipeline.readers.compression import decompressed
from data_pipeline.readers.encodings import in_utf8
from data_pipeline.readers.formats.text import document_in_memory, utf8
from data_pipeline.readers.options import ReadOptions
from data_pipeline.readers.registry import Reader, register_reader
from data_pipeline.sources.opening import open_file
from data_pipeline.sources.source_file import LeftOutError, Skipped, SourceFile

MAX_LINE_BYTES = 256 << 20
"""Size limit of a line, which is held in memory. Longer lines are left out."""


def documents_in_lines(file: SourceFile, options: ReadOptions, is_json: bool) -> Iterator[Document | Skipped]:
    """Yield a document, or the reason why there is none, for each line, blank lines included.

    Lines end with LF or CR LF, which is not part of a document. Bytes of plain lines do not change. A file in UTF-16 or
    UTF-32 that begins with a byte order mark is converted to UTF-8.

    Args:
        file: the file.
        options: which field of a JSON object is the document.
        is_json: whether the lines are JSON objects.

    Raises:
        BadDocumentError: the file cannot be read, or not further.
    """
    modality = options.modality or "text"
    with open_file(file.url) as stored, decompressed(stored, file.key, file.url) as stream:
        for number, line in enumerate(_lines(in_utf8(stream, keep_mark=not is_json))):
            key = f"{file.key}#{number:09d}"
            try:
                if line is None:
                    raise LeftOutError("damaged", f"it is longer than {MAX_LINE_BYTES:,} bytes")
                content = _document_of(line, options) if is_json else line
                if not content:
                    raise LeftOutError("empty", "it is empty")
                yield document_in_memory(key, modality, content)
            except LeftOutError as error:
                yield Skipped(key, error.reason, f"line {number + 1:,} of {file.url}: {error}")


LINES_READER = register_reader(
    Reader("lines", "Lines of text, one document each.", read_container=partial(documents_in_lines, is_json=False))
)
JSON_LINES_READER = register_reader(
    Reader(
        "jsonl",
        "JSON objects, one on each line.",
        read_container=partial(documents_in_lines, is_json=True),
        options=frozenset({"field", "target_field"}),
        suffixes=frozenset({".jsonl", ".ndjson"}),
    )
)


def _lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """Yield lines without their ends; None for a line that is too long."""
    while line := stream.readline(MAX_LINE_BYTES + 2):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(READ_BYTES)
        if line.endswith(b"\n"):  # a lone CR belongs to the line
            line = line[:-1].removesuffix(b"\r")
        yield line if len(line) <= MAX_LINE_BYTES else None


def _document_of(line: bytes, options: ReadOptions) -> bytes:
    """Return the document of a line of JSON: the text of a field, or a pair of two; a blank line has none.

    Raises:
        LeftOutError: the line is not JSON, or a field is no text.
    """
    if not line.strip():
        return b""
    try:
        value = _loaded(line.decode())  # json itself would accept surrogates in the bytes
    except (ValueError, RecursionError) as error:
        raise LeftOutError("damaged", f"not JSON: {error}") from error
    text = _text_at(value, options.field)
    if options.target_field is None:
        return text
    target = _text_at(value, options.target_field)
    return joined(text, target) if target else b""


def _text_at(value: Any, field: str) -> bytes:
    """Return the text of a field; dots lead into nested ones.

    Raises:
        LeftOutError: there is no text.
    """
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise LeftOutError("no field", f"it has no field {field!r}")
        value = value[name]
    if not isinstance(value, str):
        raise LeftOutError("no field", f"its field {field!r} is of type {type(value).__name__}, not text")
    return utf8(value)


def _loaded(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses integers of thousands of digits, which may be in fields that nobody reads
        return json.loads(line, parse_int=lambda digits: 0)
