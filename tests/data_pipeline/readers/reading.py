"""Helpers of tests that read a file or its documents."""

import gzip
from pathlib import Path

import pytest
import zstandard

from data_pipeline.documents import READ_BYTES
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers import ReadOptions, document_of, documents_in, is_container
from data_pipeline.sources.source_file import REASONS, Skipped, SourceFile, skipped


def source(path: Path | str, size: int | None = None) -> SourceFile:
    name = str(path).rsplit("/", 1)[-1]
    return SourceFile(0, str(path), name, path.stat().st_size if isinstance(path, Path) else size)


def read(path: Path | str, **options: object) -> bytes:
    """Return the content of a file that is one document."""
    document = document_of(source(path), ReadOptions(**options))
    pieces = list(document.read())
    assert all(0 < len(piece) <= READ_BYTES for piece in pieces)
    return b"".join(pieces)


def read_all(path: Path | str, **options: object) -> dict[str, bytes | str]:
    """Return the documents of a container by key, and the reason for each skipped one."""
    assert is_container(source(path), ReadOptions(**options))
    found: dict[str, bytes | str] = {}
    for one in documents_in(source(path), ReadOptions(**options)):
        assert one.key not in found
        found[one.key] = one.reason if isinstance(one, Skipped) else b"".join(one.read())
    return found


def reason_of(path: Path, **options: object) -> tuple[str, str]:
    """Return why a file is not a document: the reason, and a line that names the file."""
    with pytest.raises(BadDocumentError) as caught:
        read(path, **options)
    left_out = skipped("key", caught.value)
    assert left_out.reason in REASONS
    assert str(path) in left_out.detail
    assert "\n" not in left_out.detail
    return left_out.reason, left_out.detail


def read_until_error(path: Path, **options: object) -> tuple[dict[str, bytes | str], str]:
    """Return the documents of a container that come before an error, and the error."""
    found: dict[str, bytes | str] = {}
    with pytest.raises(BadDocumentError) as caught:
        for one in documents_in(source(path), ReadOptions(**options)):
            found[one.key] = one.reason if isinstance(one, Skipped) else b"".join(one.read())
    return found, str(caught.value)


def zstd_frames(content: bytes) -> bytes:
    """Compress into several frames, a skippable one and an empty one, like pzstd and other writers."""
    half = len(content) // 2
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"any"
    parts = [zstandard.compress(content[:half]), skippable, zstandard.compress(b""), zstandard.compress(content[half:])]
    return b"".join(parts)


def gzip_members(content: bytes) -> bytes:
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


COMPRESSED = [(".gz", gzip_members), (".zst", zstd_frames)]
