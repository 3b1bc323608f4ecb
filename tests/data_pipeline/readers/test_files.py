"""Readers of text, code, any bytes, and compressed files."""

import gzip
import io
import os
import posixpath
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.documents import MODALITIES, READ_BYTES
from data_pipeline.errors import BadDocumentError, CorpusError
from data_pipeline.readers import ReadOptions, compression, document_of, kinds
from data_pipeline.sources.listing import Selection, list_files
from data_pipeline.sources.source_file import SourceFile, skipped
from tests.conftest import STDLIB
from tests.data_pipeline.readers.reading import COMPRESSED, gzip_members, read, reason_of, source


@pytest.mark.slow
@given(content=st.binary(min_size=1, max_size=4000), size=st.integers(1, 3 * READ_BYTES))
@settings(max_examples=20, deadline=None)
def test_a_file_is_read_byte_for_byte_any_number_of_times(tmp_path_factory, content: bytes, size: int):
    path = tmp_path_factory.mktemp("t") / "file.txt"
    content = (content * (size // len(content) + 1))[:size]
    path.write_bytes(content)
    assert read(path) == read(path) == content


def test_document_can_be_read_again_after_a_partial_read(tmp_path: Path):
    path = tmp_path / "big"
    path.write_bytes(os.urandom(2 * READ_BYTES))
    document = document_of(source(path), ReadOptions())
    next(document.read())
    assert b"".join(document.read()) == path.read_bytes()


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("a.txt", "text"),
        ("README", "text"),
        ("a.PY", "code"),
        ("a.py.gz", "code"),
        ("a.rs.zst", "code"),
        ("a.exe", "binary"),
        ("a.JPG", "image"),
        ("a.flac", "audio"),
        ("a.zip", "binary"),
        ("a.jpg.gz", "binary"),
    ],
)
def test_the_suffix_decides_the_modality(name: str, modality: str):
    assert document_of(SourceFile(0, name, f"folder.py/{name}", 1), ReadOptions()).modality == modality
    assert modality in MODALITIES


@given(st.text(st.sampled_from("./aB é"), max_size=12))
def test_suffixes_are_those_of_pathlib(key: str):
    stem, suffix = posixpath.splitext(posixpath.basename(key).lower())
    assert kinds._split(key) == (stem, suffix)


def test_an_option_decides_the_modality():
    assert document_of(source("a.png", 1), ReadOptions(modality="binary")).modality == "binary"
    assert document_of(source("a.png", 1), ReadOptions(reader="files")).modality == "binary"
    assert document_of(source("a.dat", 1), ReadOptions(reader="audio")).modality == "audio"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"reader": "image"}, r"image is not the name of a reader \(did you mean images\?\)"),
        ({"reader": "lines", "image_size": 8}, "--reader lines does not use the option image_size"),
        ({"modality": "video"}, "unknown modality 'video'"),
        ({"image_scan": "patch", "patch_size": 100}, "--patch-size is 100"),
        ({"image_size": 0}, "image_size is 0"),
    ],
)
def test_options_without_an_effect_are_refused(options: dict[str, object], problem: str):
    with pytest.raises(CorpusError, match=problem):
        ReadOptions(**options)


@pytest.mark.parametrize("change", [b"", b"less", b"more than before"])
def test_a_file_that_changed_since_it_was_listed_is_named(tmp_path: Path, change: bytes):
    path = tmp_path / "file"
    path.write_bytes(b"as before")
    file = source(path)
    path.write_bytes(change)
    with pytest.raises(
        BadDocumentError, match=f"changed since it was listed: it had 9 bytes then and has {len(change)} now"
    ):
        list(document_of(file, ReadOptions()).read())


def test_a_file_that_vanished_is_unreadable(tmp_path: Path):
    document = document_of(source(str(tmp_path / "gone"), 1), ReadOptions())
    with pytest.raises(BadDocumentError, match="No such file or directory") as caught:
        list(document.read())
    assert skipped("k", caught.value).reason == "unreadable"


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_text_only_skips_binary_files(tmp_path: Path, name: str):
    store = gzip.compress if name.endswith(".gz") else bytes
    cases = [
        (b"text \x00 with a NUL", True),
        ("grüße".encode("latin-1"), True),
        (b"\xff\xfe", True),
        (b"\xe2\x82", True),
    ]
    cases += [("grüße ✓".encode(), False), (b"x" * (READ_BYTES - 1) + "✓✓".encode(), False)]  # cut within a character
    for content, is_binary in cases:
        (tmp_path / name).write_bytes(store(content))
        assert read(tmp_path / name) == content
        if is_binary:
            assert reason_of(tmp_path / name, skip_binary=True)[0] == "binary"
        else:
            assert read(tmp_path / name, skip_binary=True) == content


def test_standard_library_is_text_except_its_compiled_files():
    options = ReadOptions(skip_binary=True)
    for file in list_files([str(STDLIB / "json")], Selection()):
        if isinstance(file, SourceFile):
            document = document_of(file, options)
            if file.key.endswith(".pyc"):
                with pytest.raises(BadDocumentError, match="not UTF-8"):
                    list(document.read())
            else:
                assert b"".join(document.read()) == Path(file.url).read_bytes()


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED)
@given(content=st.binary(min_size=1, max_size=100), repeats=st.integers(1, 100_000))
@settings(max_examples=25, deadline=None)
def test_the_content_of_compressed_files_is_read(tmp_path_factory, suffix, compress, content: bytes, repeats: int):
    path = tmp_path_factory.mktemp("t") / f"a.txt{suffix}"
    path.write_bytes(compress(content * repeats))
    assert read(path) == content * repeats
    assert read(path, reader="files") == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "compress", "whole_parts"), [(*COMPRESSED[0], 1), (*COMPRESSED[1], 3)])
def test_every_truncation_of_a_compressed_file_is_found(tmp_path: Path, suffix: str, compress, whole_parts: int):
    """A truncation between two members or frames leaves a valid file and is excluded."""
    content = random.Random(0).randbytes(300)
    whole = compress(content)
    path = tmp_path / f"a{suffix}"
    silent = []
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        try:
            silent.append(read(path))
        except BadDocumentError as error:
            assert f"{path} is cut short" in str(error)
    assert silent == [content[:150]] * whole_parts


def test_gzip_with_zero_padding_is_read(tmp_path: Path):
    (tmp_path / "a.gz").write_bytes(gzip_members(b"content") + bytes(9000))
    assert read(tmp_path / "a.gz") == b"content"


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED)
def test_damaged_and_misnamed_compressed_files_are_found(tmp_path: Path, suffix: str, compress):
    path = tmp_path / f"a{suffix}"
    whole = bytearray(
        gzip.compress(bytes(999))
        if suffix == ".gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(bytes(999))
    )
    whole[-6] ^= 1
    path.write_bytes(whole)
    assert reason_of(path)[0] == "damaged"
    path.write_bytes(b"just text")
    assert "cannot be decompressed" in reason_of(path)[1]
    path.write_bytes(compress(b""))
    assert reason_of(path)[0] == "empty"


@pytest.mark.slow
def test_decompression_bomb_is_read_in_bounded_memory():
    """256 MiB of zeros take some kB. They are decompressed a few bytes at a time."""
    bomb = io.BytesIO(zstandard.compress(bytes(256 << 20)))
    stream = compression.decompressed(bomb, "a.zst", "a.zst")
    assert len(stream.read(1000)) == 1000
    assert bomb.tell() <= compression.FEED_BYTES
