"""Readers: what becomes of files of every kind, whole, damaged and misnamed."""

import gzip
import io
import json
import os
import posixpath
import random
import subprocess
import sys
import tarfile
import warnings
import wave
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.documents import MODALITIES, READ_BYTES, Document
from data_pipeline.errors import BadDocumentError, CorpusError
from data_pipeline.readers import ReadOptions, compression, document_of, documents_in, is_container, kinds, lines
from data_pipeline.readers.images import patch_scan, raster_scan, unscan
from data_pipeline.readers.text import utf8
from data_pipeline.sources.listing import Selection, list_files
from data_pipeline.sources.source_file import REASONS, Skipped, SourceFile, skipped
from tests.conftest import STDLIB
from tests.data_pipeline.conftest import Real


def source(path: Path | str, size: int | None = None) -> SourceFile:
    name = str(path).rsplit("/", 1)[-1]
    return SourceFile(0, str(path), name, path.stat().st_size if isinstance(path, Path) else size)


def read(path: Path | str, **options: object) -> bytes:
    """Return the document that a file is."""
    document = document_of(source(path), ReadOptions(**options))
    pieces = list(document.read())
    assert all(0 < len(piece) <= READ_BYTES for piece in pieces)
    return b"".join(pieces)


def read_all(path: Path | str, **options: object) -> dict[str, bytes | str]:
    """Return the documents of a container by key; for what is skipped, its reason."""
    assert is_container(source(path), ReadOptions(**options))
    found: dict[str, bytes | str] = {}
    for one in documents_in(source(path), ReadOptions(**options)):
        assert one.key not in found
        found[one.key] = one.reason if isinstance(one, Skipped) else b"".join(one.read())
    return found


def reason_of(path: Path, **options: object) -> tuple[str, str]:
    """Return why a file is no document: the reason, and a line that names the file."""
    with pytest.raises(BadDocumentError) as caught:
        read(path, **options)
    left_out = skipped("key", caught.value)
    assert left_out.reason in REASONS
    assert str(path) in left_out.detail
    assert "\n" not in left_out.detail
    return left_out.reason, left_out.detail


# Text, code, any bytes


@given(content=st.binary(min_size=1, max_size=4000), size=st.integers(1, 3 * READ_BYTES))
@settings(max_examples=20, deadline=None)
def test_a_file_is_read_byte_for_byte_any_number_of_times(tmp_path_factory, content: bytes, size: int):
    path = tmp_path_factory.mktemp("t") / "file.txt"
    content = (content * (size // len(content) + 1))[:size]
    path.write_bytes(content)
    assert read(path) == read(path) == content


def test_a_document_can_be_read_again_after_it_was_left_half_way(tmp_path: Path):
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
def test_modality_is_told_by_the_suffix(name: str, modality: str):
    assert document_of(SourceFile(0, name, f"folder.py/{name}", 1), ReadOptions()).modality == modality
    assert modality in MODALITIES


@given(st.text(st.sampled_from("./aB é"), max_size=12))
def test_a_suffix_is_what_python_takes_for_one(key: str):
    stem, suffix = posixpath.splitext(posixpath.basename(key).lower())
    assert kinds._split(key) == (stem, suffix)


def test_modality_is_what_it_is_said_to_be():
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
def test_options_that_mean_nothing_are_refused(options: dict[str, object], problem: str):
    with pytest.raises(CorpusError, match=problem):
        ReadOptions(**options)


@pytest.mark.parametrize("change", [b"", b"less", b"more than before"])
def test_a_file_that_changed_since_it_was_listed_is_told(tmp_path: Path, change: bytes):
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
def test_binary_files_are_left_out_when_asked(tmp_path: Path, name: str):
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


def test_the_standard_library_is_text_but_for_its_compiled_parts():
    options = ReadOptions(skip_binary=True)
    for file in list_files([str(STDLIB / "json")], Selection()):
        if isinstance(file, SourceFile):
            document = document_of(file, options)
            if file.key.endswith(".pyc"):
                with pytest.raises(BadDocumentError, match="not UTF-8"):
                    list(document.read())
            else:
                assert b"".join(document.read()) == Path(file.url).read_bytes()


# Compressed files


def zstd_frames(content: bytes) -> bytes:
    """As pzstd and many writers do it: frames one after the other, one that is to be skipped, and one of nothing."""
    half = len(content) // 2
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"any"
    parts = [zstandard.compress(content[:half]), skippable, zstandard.compress(b""), zstandard.compress(content[half:])]
    return b"".join(parts)


def gzip_members(content: bytes) -> bytes:
    half = len(content) // 2
    return gzip.compress(content[:half]) + gzip.compress(content[half:])


COMPRESSED = [(".gz", gzip_members), (".zst", zstd_frames)]


@pytest.mark.parametrize(("suffix", "compress"), COMPRESSED)
@given(content=st.binary(min_size=1, max_size=100), repeats=st.integers(1, 100_000))
@settings(max_examples=25, deadline=None)
def test_compressed_files_are_read_as_what_is_in_them(tmp_path_factory, suffix, compress, content: bytes, repeats: int):
    path = tmp_path_factory.mktemp("t") / f"a.txt{suffix}"
    path.write_bytes(compress(content * repeats))
    assert read(path) == content * repeats
    assert read(path, reader="files") == path.read_bytes()


@pytest.mark.parametrize(("suffix", "compress", "whole_parts"), [(*COMPRESSED[0], 1), (*COMPRESSED[1], 3)])
def test_every_cut_of_a_compressed_file_is_found(tmp_path: Path, suffix: str, compress, whole_parts: int):
    """But for a cut between two members or frames, which leaves a file that is whole."""
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


def test_gzip_padded_to_the_blocks_of_a_tape_is_read(tmp_path: Path):
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


def test_a_bomb_is_read_in_bounded_memory():
    """256 MiB of zeros in some kB, of which a few bytes at a time are decompressed."""
    bomb = io.BytesIO(zstandard.compress(bytes(256 << 20)))
    stream = compression.decompressed(bomb, "a.zst", "a.zst")
    assert len(stream.read(1000)) == 1000
    assert bomb.tell() <= compression.FEED_BYTES


# Lines


def test_each_line_is_a_document(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntwo\r\n\xff not text\nlast")
    expected = {
        "a.txt#000000000": b"one",
        "a.txt#000000001": "empty",
        "a.txt#000000002": b"two",
        "a.txt#000000003": b"\xff not text",
        "a.txt#000000004": b"last",
    }
    assert read_all(path, reader="lines") == expected
    for suffix, compress in COMPRESSED:
        (tmp_path / f"a.txt{suffix}").write_bytes(compress(path.read_bytes()))
        found = read_all(tmp_path / f"a.txt{suffix}", reader="lines")
        assert list(found.values()) == list(expected.values())


@pytest.mark.slow
@given(texts=st.lists(st.text(min_size=1, max_size=20), max_size=10))
@settings(max_examples=30, deadline=None)
def test_json_lines_give_back_every_text(tmp_path_factory, texts: list[str]):
    path = tmp_path_factory.mktemp("t") / "a.jsonl"
    path.write_text("".join(json.dumps({"n": 1, "meta": {"body": text}}) + "\n" for text in texts))
    assert list(read_all(path, field="meta.body").values()) == [text.encode() for text in texts]


def test_lines_without_the_text_are_skipped_with_their_number_and_the_rest_is_read(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    lines_ = [
        '{"text": "first"}',
        '{"text": ',
        '{"body": "x"}',
        '{"text": 7}',
        '{"text": null}',
        "[1]",
        "",
        '{"text": ""}',
    ]
    lines_ += ["[" * 100_000, "\udcff", '{"text": "last"}']
    path.write_bytes("\n".join(lines_).encode("utf-8", "surrogateescape"))
    found = list(documents_in(source(path), ReadOptions()))
    left_out = {one.key: one for one in found if isinstance(one, Skipped)}
    assert [one.key for one in found if isinstance(one, Document)] == ["a.jsonl#000000000", "a.jsonl#000000010"]
    reasons = ["damaged", "no field", "no field", "no field", "no field", "empty", "empty", "damaged", "damaged"]
    assert [one.reason for one in left_out.values()] == reasons
    assert left_out["a.jsonl#000000001"].detail.startswith(f"line 2 of {path}: not JSON: ")
    assert left_out["a.jsonl#000000003"].detail == f"line 4 of {path}: its field 'text' is of type int, not text"


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".NDJSON.ZST"])
def test_json_lines_are_known_by_their_suffix(tmp_path: Path, suffix: str):
    content = b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n'
    compress = dict(COMPRESSED).get(Path(suffix).suffix.lower(), bytes)
    (tmp_path / f"a{suffix}").write_bytes(compress(content))
    assert list(read_all(tmp_path / f"a{suffix}").values()) == [b"a", b"b"]


def test_lone_surrogates_become_replacement_characters_and_pairs_one_character():
    assert utf8(json.loads(r'"\ud83d\ude00 \ud83d \ude00"')) == "😀 \ufffd \ufffd".encode()


def test_a_line_that_is_too_long_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
    path = tmp_path / "a"
    path.write_bytes(b"0123456789\r\n" + b"x" * 11 + b"\n" + b"y" * (3 * READ_BYTES) + b"\nlast")
    assert list(read_all(path, reader="lines").values()) == [b"0123456789", "damaged", "damaged", b"last"]


def test_a_cut_file_of_lines_gives_its_whole_lines_and_then_the_error(tmp_path: Path):
    texts = [f"{number} {random.Random(number).random()}" for number in range(2000)]
    path = tmp_path / "a.jsonl.zst"
    frames = [
        zstandard.compress("".join(json.dumps({"text": t}) + "\n" for t in texts[i : i + 500]).encode())
        for i in (0, 500)
    ]
    path.write_bytes(frames[0] + frames[1][:-100])
    got: list[str] = []
    with pytest.raises(BadDocumentError, match=f"{path} is cut short"):
        got.extend(b"".join(one.read()).decode() for one in documents_in(source(path), ReadOptions()))
    assert 500 <= len(got) < 1000
    assert got == texts[: len(got)]


# Parquet


def test_each_row_is_a_document(tmp_path: Path):
    path = tmp_path / "a.parquet"
    rows = [f"row {number} ✓" for number in range(1000)]
    rows[3], rows[500] = None, ""
    pq.write_table(pa.table({"id": range(1000), "text": rows}), path, row_group_size=300)
    found = read_all(path)
    assert list(found) == [f"a.parquet#{number:09d}" for number in range(1000)]
    assert (found["a.parquet#000000003"], found["a.parquet#000000500"]) == ("no field", "empty")
    assert [text for text in found.values() if isinstance(text, bytes)] == [row.encode() for row in rows if row]


@pytest.mark.parametrize(
    ("kind", "modality"),
    [
        (pa.string(), "text"),
        (pa.large_string(), "text"),
        (pa.dictionary(pa.int32(), pa.string()), "text"),
        (pa.binary(), "binary"),
        (pa.large_binary(), "binary"),
        (pa.binary(3), "binary"),
    ],
)
def test_columns_of_text_and_of_bytes_are_read(tmp_path: Path, kind: pa.DataType, modality: str):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": pa.array(["abc", None, "def"], pa.string()).cast(kind)}), path)
    documents = [one for one in documents_in(source(path), ReadOptions(field="body")) if isinstance(one, Document)]
    assert [b"".join(one.read()) for one in documents] == [b"abc", b"def"]
    assert {one.modality for one in documents} == {modality}


def test_dots_lead_into_structures(tmp_path: Path):
    path = tmp_path / "a.parquet"
    rows = [
        {"id": 1, "meta": {"text": "a", "x": 1}},
        {"id": 2, "meta": {"text": None, "x": 1}},
        {"id": 3, "meta": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert list(read_all(path, field="meta.text").values()) == [b"a", "no field", "no field"]


@pytest.mark.parametrize(
    ("field", "problem"), [("txt", r"no column 'txt'; it has id, text"), ("id", "has type int64, which is not text")]
)
def test_a_column_that_is_no_text_is_told(tmp_path: Path, field: str, problem: str):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "text": ["a"]}), path)
    with pytest.raises(BadDocumentError, match=problem):
        read_all(path, field=field)


def test_damaged_parquet_is_told(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [os.urandom(50).hex() for _ in range(5000)]}), path, compression="zstd")
    whole = path.read_bytes()
    for damaged in (b"no parquet", whole[:-10], whole[: len(whole) // 2], b"PAR1" + os.urandom(9999) + whole[10_003:]):
        path.write_bytes(damaged)
        with pytest.raises(BadDocumentError, match=f"cannot read {path}"):
            read_all(path)


# Tars


def tar_of(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
def test_each_member_is_a_document(tmp_path: Path, suffix: str):
    path = tmp_path / f"a{suffix}"
    members = {"000.txt": b"text", "000.cls": b"7", "./sub/é.py": b"code", "large.bin": os.urandom(3 * READ_BYTES + 1)}
    compress = gzip.compress if suffix.endswith("gz") else zstd_frames if suffix.endswith("zst") else bytes
    path.write_bytes(compress(tar_of(members | {"empty": b""})))
    expected = {f"a{suffix}/{name.removeprefix('./')}": content for name, content in members.items()}
    assert read_all(path) == expected | {f"a{suffix}/empty": "empty"}
    found = documents_in(source(path), ReadOptions())
    assert [one.modality for one in found if isinstance(one, Document)] == ["text", "text", "code", "binary"]


def test_only_members_of_the_suffixes_asked_for_are_taken(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({"0.txt": b"a", "0.json": b"{}", "0.seg.TXT": b"b", "txt": b"c"}))
    assert read_all(path, members=("txt",)) == {"a.tar/0.txt": b"a", "a.tar/0.seg.TXT": b"b"}
    assert read_all(path, members=("seg.txt", "json")) == {"a.tar/0.json": b"{}", "a.tar/0.seg.TXT": b"b"}


def test_a_member_is_read_any_number_of_times_until_the_next_is_asked_for(tmp_path: Path):
    path = tmp_path / "a.tar"
    members = {name: os.urandom(9 << 20) for name in "abc"}
    path.write_bytes(tar_of(members))
    documents = documents_in(source(path), ReadOptions())
    first = next(documents)
    next(first.read())
    assert b"".join(first.read()) == b"".join(first.read()) == members["a"]
    next(documents)  # not read at all
    assert b"".join(next(documents).read()) == members["c"]
    with pytest.raises(RuntimeError, match="before the next"):
        list(first.read())


def test_links_in_a_tar_are_skipped_and_folders_are_nothing(tmp_path: Path):
    (tmp_path / "t/deep").mkdir(parents=True)
    (tmp_path / "t/file").write_text("x")
    (tmp_path / "t/hard").hardlink_to(tmp_path / "t/file")
    (tmp_path / "t/soft").symlink_to("file")
    subprocess.run(["tar", "cf", "a.tar", "--sort=name", "t"], cwd=tmp_path, check=True)
    assert read_all(tmp_path / "a.tar") == {"a.tar/t/file": b"x", "a.tar/t/hard": "link", "a.tar/t/soft": "link"}


@pytest.mark.parametrize("writer", ["gnu", "pax"])
def test_sparse_members_of_a_tar_are_skipped_as_a_few_bytes_could_fill_a_disk(tmp_path: Path, writer: str):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "b").write_bytes(b"x")
    subprocess.run(["tar", "cSf", "a.tar", f"--format={writer}", "a", "b"], cwd=tmp_path, check=True)
    assert read_all(tmp_path / "a.tar") == {"a.tar/a": "sparse", "a.tar/b": b"x"}


@pytest.mark.parametrize("writer", ["gnu", "pax", "ustar", "v7"])
def test_tars_of_every_format_are_read(tmp_path: Path, writer: str):
    name = "n" * 150 if writer in ("gnu", "pax") else "n"
    (tmp_path / name).write_bytes(b"content")
    subprocess.run(["tar", "cf", "a.tar", f"--format={writer}", name], cwd=tmp_path, check=True)
    assert read_all(tmp_path / "a.tar") == {f"a.tar/{name}": b"content"}


@pytest.mark.parametrize("suffix", [".tar", ".tar.zst"])
def test_a_cut_tar_gives_what_is_whole_and_then_the_error_wherever_it_is_cut(tmp_path: Path, suffix: str):
    members = {f"{number}.txt": random.Random(number).randbytes(700) for number in range(4)}
    raw = tar_of(members)
    whole = zstandard.compress(raw) if suffix == ".tar.zst" else raw
    content_end = 4 * (512 + 1024)  # each member is a header and two blocks
    path = tmp_path / f"a{suffix}"
    for length in range(0, len(whole) if suffix == ".tar.zst" else content_end + 1, 97):
        path.write_bytes(whole[:length])
        found = {}
        with pytest.raises(BadDocumentError, match=f"{path}.* (is damaged or cut short|is cut short)"):
            for one in documents_in(source(path), ReadOptions()):
                found[one.key] = b"".join(one.read())
        assert list(found.items()) == [(f"a{suffix}/{k}", v) for k, v in members.items()][: len(found)]
        if suffix == ".tar":
            assert len(found) == sum(length >= number * 1536 + 512 + 700 for number in range(4))


def test_damage_in_the_middle_of_a_tar_is_not_its_end(tmp_path: Path):
    """Where tarfile itself would stop without a word."""
    whole = bytearray(tar_of({"a": b"1" * 512, "b": b"2" * 512, "c": b"3" * 512}))
    whole[1024:1034] = b"\xff" * 10  # b's name
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    found = []
    with pytest.raises(BadDocumentError, match="bad checksum"):
        found.extend(one.key for one in documents_in(source(path), ReadOptions()))
    assert found == ["a.tar/a"]


def test_what_follows_the_end_of_a_tar_is_told(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({"a": b"1"}) + tar_of({"b": b"2"}))
    with pytest.raises(BadDocumentError, match="has more bytes after its end"):
        read_all(path)


@pytest.mark.parametrize("content", [b"", b"no tar at all", os.urandom(2000)])
def test_what_is_no_tar_is_told(tmp_path: Path, content: bytes):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(BadDocumentError, match=f"{path} is damaged or cut short"):
        read_all(path)


def test_media_in_a_tar_are_decoded_as_files_are(tmp_path: Path, real: Real):
    files = [*real("images/in64_n01")[:3], *real("audio/fsdd_0_")[:3]]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in files:
            tar.add(file, file.name)
    found = read_all(tmp_path / "a.tar")
    assert found == {f"a.tar/{file.name}": read(file) for file in files}
    raw = read_all(tmp_path / "a.tar", reader="tar")
    assert raw == {f"a.tar/{file.name}": file.read_bytes() for file in files}
    images = read_all(tmp_path / "a.tar", reader="images", members=("png",), image_size=8)
    assert [len(pixels) for pixels in images.values()] == [8 * 8 * 3] * 3


def test_real_books_come_out_of_a_compressed_tar_byte_for_byte(tmp_path: Path, real: Real):
    books = real("books/valid/")
    with (
        (tmp_path / "a.tar.zst").open("wb") as file,
        zstandard.ZstdCompressor().stream_writer(file) as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        for book in books:
            tar.add(book, book.name)
    assert read_all(tmp_path / "a.tar.zst") == {f"a.tar.zst/{book.name}": book.read_bytes() for book in books}


# Images


def images(draw: st.DrawFn, side: int = 1) -> np.ndarray:
    height, width = (side * draw(st.integers(1, 6)) for _ in range(2))
    return np.random.default_rng(draw(st.integers(0, 99))).integers(0, 256, (height, width, 3), np.uint8)


@given(data=st.data(), side=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_both_scans_can_be_undone(data: st.DataObject, side: int):
    pixels = images(data.draw, side)
    height, width, _ = pixels.shape
    assert np.array_equal(unscan(raster_scan(pixels), height, width), pixels)
    patch_size = 3 * side * side
    scanned = patch_scan(pixels, patch_size)
    assert np.array_equal(unscan(scanned, height, width, patch_size), pixels)
    # MEGABYTE: the k-th patch is the k-th tile of p x p pixels in raster order, p = sqrt(P / 3).
    for k in range(height * width // side**2):
        y, x = divmod(k, width // side)
        tile = pixels[y * side : (y + 1) * side, x * side : (x + 1) * side]
        assert scanned[k * patch_size : (k + 1) * patch_size] == tile.tobytes()


def test_patch_scan_of_an_image_written_by_hand():
    """Two rows of four grey pixels; patches of 12 bytes are tiles of 2 x 2."""
    pixels = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.uint8)[..., None].repeat(3, axis=2)
    assert patch_scan(pixels, 12)[::3] == bytes([1, 2, 5, 6, 3, 4, 7, 8])
    assert raster_scan(pixels)[::3] == bytes([1, 2, 3, 4, 5, 6, 7, 8])
    assert raster_scan(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)) == bytes([1, 2, 3, 4, 5, 6])  # RGB, RGB


@pytest.mark.parametrize("size", [0, 3 * 5, 47, 64])
def test_patches_that_are_no_square_of_pixels_are_refused(size: int):
    with pytest.raises(ValueError, match="do not make a square tile"):
        patch_scan(np.zeros((8, 8, 3), np.uint8), size)


def test_real_photographs_become_their_pixels(real: Real):
    for path in [*real("images/in64_n01")[:20], *real("images/cifar32_train_cat_1")[:20]]:
        pixels = np.asarray(Image.open(path))
        height, width, _ = pixels.shape
        assert read(path) == pixels.tobytes()
        assert np.array_equal(unscan(read(path, image_scan="patch", patch_size=48), height, width, 48), pixels)


@pytest.mark.parametrize("mode", ["lanczos", "box"])
def test_the_shorter_side_is_scaled_and_the_middle_is_kept(tmp_path: Path, mode: str):
    image = Image.effect_noise((90, 30), 60).convert("RGB")
    for turned in (image, image.transpose(Image.Transpose.ROTATE_90)):
        path = saved(tmp_path / "a.png", turned)
        for size in (10, 15):
            whole = turned.resize(
                (turned.width * size // 30, turned.height * size // 30), getattr(Image.Resampling, mode.upper())
            )
            left, top = (whole.width - size) // 2, (whole.height - size) // 2
            middle = np.asarray(whole.crop((left, top, left + size, top + size))).astype(int)
            pixels = unscan(read(path, image_size=size, image_filter=mode), size, size)
            assert np.abs(pixels - middle).max() <= 1


def test_box_is_the_mean_of_whole_pixels(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    means = pixels.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    scaled = unscan(read(tmp_path / "a.png", image_size=32, image_filter="box"), 32, 32)
    assert np.abs(scaled - means).max() <= 1  # rounded after its rows and again after its columns


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_every_mode_becomes_rgb(tmp_path: Path):
    white, red, half = bytes([255] * 3), bytes([255, 0, 0]), bytes([255, 127, 127])
    clear = Image.new("RGBA", (1, 1), (9, 9, 9, 0))
    cases = {
        "grey.png": (Image.new("L", (1, 1), 7), bytes([7] * 3)),
        "bits.png": (Image.new("1", (1, 1), 1), white),
        "clear.png": (clear, white),
        "half.png": (Image.new("RGBA", (1, 1), (255, 0, 0, 128)), half),
        "clear-grey.png": (Image.new("LA", (1, 1), (9, 0)), white),
        "palette.png": (Image.new("RGB", (1, 1), "red").convert("P"), red),
        "sixteen.png": (Image.fromarray(np.array([[0xABCD]], np.uint16)), bytes([0xAB] * 3)),
        "sixteen.tif": (Image.fromarray(np.array([[0xABCD]], np.uint16)), bytes([0xAB] * 3)),
        "cmyk.tif": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), red),
    }
    for name, (image, expected) in cases.items():
        assert (name, read(saved(tmp_path / name, image))) == (name, expected)
    keyed = saved(tmp_path / "keyed.gif", Image.new("P", (1, 1), 0), transparency=0)
    assert read(keyed) == white
    assert "floating-point" in reason_of(saved(tmp_path / "f.tif", Image.new("F", (1, 1), 0.5)))[1]


def test_images_are_turned_upright(tmp_path: Path):
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    assert read(tmp_path / "a.png") == bytes([255, 0, 0, 0, 0, 255])  # now one above the other
    pixels = unscan(read(tmp_path / "a.png"), 2, 1)
    assert pixels[0, 0].tolist() == [255, 0, 0]


def test_damaged_and_misnamed_images(tmp_path: Path, real: Real):
    jpeg, png = real("images/tiny64_n0144")[0], real("images/in64_n01")[0]
    named = {
        "half.jpg": jpeg.read_bytes()[: jpeg.stat().st_size // 2],
        "half.png": png.read_bytes()[: png.stat().st_size // 2],
        "header.png": png.read_bytes()[:20],
        "text.jpg": b"no image at all, but a line of text\n" * 100,
        "nul.png": bytes(1000),
    }
    for name, content in named.items():
        (tmp_path / name).write_bytes(content)
        reason, detail = reason_of(tmp_path / name)
        assert (name, reason) == (name, "damaged")
        assert "cannot be decoded as an image" in detail
    (tmp_path / "png.jpg").write_bytes(png.read_bytes())  # opens by its content
    assert read(tmp_path / "png.jpg") == read(png)
    assert read(tmp_path / "text.jpg", reader="files") == named["text.jpg"]


def test_every_cut_of_a_png_is_found(tmp_path: Path, real: Real):
    whole = real("images/in64_n01")[0].read_bytes()
    path = tmp_path / "a.png"
    for length in range(1, len(whole) - 16, 499):  # its last chunk has 12 bytes and no pixel
        path.write_bytes(whole[:length])
        assert reason_of(path)[0] == "damaged"


def image_with_damaged_exif(path: Path) -> Path:
    """Write an image about which Pillow warns."""
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01\0")
    return path


def test_a_warning_of_an_image_library_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(image_with_damaged_exif(tmp_path / "a.jpg"))
    assert caplog.messages[0].startswith(f"{tmp_path}/a.jpg was decoded with a warning: Corrupt EXIF data")
    tiff = saved(tmp_path / "a.tif", Image.effect_noise((64, 64), 100), compression="tiff_lzw")
    content = bytearray(tiff.read_bytes())
    content[1000:1100] = b"\xff" * 100
    tiff.write_bytes(content)
    assert "Using code not yet in table" in reason_of(tiff)[1]
    assert capfd.readouterr().err == ""


def test_a_warning_of_a_sound_library_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
):
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.sin(np.arange(44_100) * 0.05), 44_100, format="MP3", subtype="MPEG_LAYER_III")
    content = bytearray(path.read_bytes())
    content[3000:3600] = b"\xa5" * 600
    path.write_bytes(content)
    read(path)
    assert caplog.messages[0].startswith(f"{path} was decoded with a warning: Note: Illegal Audio-MPEG-Header")
    assert len(caplog.messages) == 1
    assert capfd.readouterr().err == ""


def test_an_image_that_says_it_is_huge_is_refused(tmp_path: Path):
    path = saved(tmp_path / "a.png", Image.new("1", (20_000, 4_000)))
    assert path.stat().st_size < 100_000
    assert "20000 x 4000 pixels" in reason_of(path)[1]


def test_an_image_that_does_not_divide_into_tiles_is_refused(tmp_path: Path):
    path = saved(tmp_path / "a.png", Image.new("RGB", (17, 16)))
    assert "17 x 16 pixels cannot be divided into tiles of 8 x 8" in reason_of(path, image_scan="patch")[1]
    assert len(read(path, image_scan="patch", image_size=16)) == 768


def test_an_image_at_a_url_is_decoded(real: Real):
    path = real("images/in64_n01")[0]
    fsspec.filesystem("memory").pipe("/photographs/a.png", path.read_bytes())
    [file] = list_files(["memory://photographs"], Selection())
    assert b"".join(document_of(file, ReadOptions()).read()) == read(path)


# Sound


def wav_samples(path: Path) -> bytes:
    with wave.open(str(path)) as file:
        return file.readframes(file.getnframes())


def write_wav(path: Path, samples: bytes, rate: int = 8000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples)
    return path


def test_real_speech_comes_out_bit_for_bit(real: Real):
    for path in [*real("audio/fsdd_0_")[:20], *real("audio/kerstin_de_rhasspy-1")[:10], *real("audio/picovoice")[:5]]:
        assert read(path) == wav_samples(path)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_every_16_bit_sample_comes_out_bit_for_bit(tmp_path: Path, channels: int):
    samples = np.arange(-32768, 32768, dtype="<i2").repeat(channels).tobytes()
    path = write_wav(tmp_path / "a.wav", samples, channels=channels)
    assert read(path) == samples
    frames = np.frombuffer(samples, "<i2").reshape(-1, channels)
    for name in ("a.flac", "a.aiff", "a.w64", "a.caf", "a.au"):
        soundfile.write(tmp_path / name, frames, 8000, subtype="PCM_16")
        assert read(tmp_path / name) == samples


def test_other_samples_are_rounded_and_clipped(tmp_path: Path):
    exact = np.array([0, 0.4, 0.5, 1.5, -0.5, 32766.6, 32768, 40000, -32768, -40000]) / 32768
    expected = [0, 0, 0, 2, 0, 32767, 32767, 32767, -32768, -32768]
    soundfile.write(tmp_path / "a.wav", exact, 8000, subtype="FLOAT")
    assert np.frombuffer(read(tmp_path / "a.wav"), "<i2").tolist() == expected
    soundfile.write(
        tmp_path / "b.wav", np.array([0x7FFFFF00, 0x12347F00, 0x12348100], np.int32), 8000, subtype="PCM_24"
    )
    assert np.frombuffer(read(tmp_path / "b.wav"), "<i2").tolist() == [32767, 0x1234, 0x1235]


def test_channels_are_mixed_into_their_mean(tmp_path: Path):
    frames = np.array([[100, 200], [-1, -2], [32767, 32767], [-32768, 32767]], "<i2")
    path = write_wav(tmp_path / "a.wav", frames.tobytes(), channels=2)
    assert np.frombuffer(read(path, audio_channels=1), "<i2").tolist() == [150, -2, 32767, 0]  # halves to even


@pytest.mark.parametrize(("rate", "to"), [(8000, 16000), (44100, 16000), (48000, 44100), (16000, 16000)])
def test_streamed_resampling_is_that_of_the_whole(tmp_path: Path, rate: int, to: int):
    """A file of some pieces, against soxr given all of it at once."""
    noise = np.random.default_rng(0).normal(0, 0.1, (400_000, 2)).astype(np.float32)
    samples = np.rint(noise * 32768).astype("<i2")
    path = write_wav(tmp_path / "a.wav", samples.tobytes(), rate, channels=2)
    whole = soxr.resample(samples.astype(np.float32) / 32768, rate, to) if rate != to else samples / 32768
    assert read(path, audio_rate=to) == np.rint(whole * 32768).clip(-32768, 32767).astype("<i2").tobytes()
    assert len(whole) == pytest.approx(400_000 * to / rate, abs=1)


def test_a_tone_keeps_its_pitch(tmp_path: Path):
    tone = np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000) * 10_000
    path = write_wav(tmp_path / "a.wav", tone.astype("<i2").tobytes(), 48_000)
    samples = np.frombuffer(read(path, audio_rate=16_000), "<i2")
    assert len(samples) == 16_000
    assert np.abs(np.fft.rfft(samples)).argmax() == 440


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".mp3"])
def test_compressed_sound_is_decoded(tmp_path: Path, suffix: str, real: Real):
    speech = real("audio/picovoice")[0]
    frames, rate = soundfile.read(speech)
    soundfile.write(tmp_path / f"a{suffix}", frames, rate)
    decoded = np.frombuffer(read(tmp_path / f"a{suffix}"), "<i2").astype(float)
    original = np.frombuffer(wav_samples(speech), "<i2")
    assert len(decoded) == len(original)
    assert np.corrcoef(decoded, original)[0, 1] > 0.99


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.aiff", "a.au", "a.w64"])
def test_sound_that_is_cut_short_is_found(tmp_path: Path, name: str):
    path = tmp_path / name
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 20_000), 8000)
    whole = path.read_bytes()
    for length in (len(whole) - 2, len(whole) // 2, 20, 4):
        path.write_bytes(whole[:length])
        assert reason_of(path)[0] == "damaged"


def test_wav_from_a_pipe_which_does_not_know_its_length_is_read(tmp_path: Path):
    samples = np.arange(1000, dtype="<i2").tobytes()
    path = write_wav(tmp_path / "a.wav", samples)
    whole = bytearray(path.read_bytes())
    whole[4:8] = whole[40:44] = b"\xff" * 4
    path.write_bytes(whole)
    assert read(path) == samples


def test_misnamed_and_empty_sound(tmp_path: Path, real: Real):
    (tmp_path / "text.wav").write_text("no sound at all\n" * 100)
    assert "cannot be decoded as sound" in reason_of(tmp_path / "text.wav")[1]
    assert reason_of(write_wav(tmp_path / "none.wav", b""))[0] == "empty"
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 8000, subtype="FLOAT")
    assert "not finite numbers" in reason_of(tmp_path / "nan.wav")[1]
    speech = real("audio/fsdd_0_")[0]
    (tmp_path / "wav.mp3").write_bytes(speech.read_bytes())
    assert read(tmp_path / "wav.mp3") == wav_samples(speech)


def test_sound_at_a_url_and_of_no_suffix_is_decoded(real: Real):
    path = real("audio/fsdd_0_")[0]
    fsspec.filesystem("memory").pipe("/speech/a", path.read_bytes())
    [file] = list_files(["memory://speech"], Selection())
    assert b"".join(document_of(file, ReadOptions(reader="audio")).read()) == wav_samples(path)


# Memory and time


MEASURE = """
import resource, sys
from data_pipeline.readers import ReadOptions, document_of, documents_in, is_container
from data_pipeline.sources.source_file import SourceFile
file = SourceFile(0, sys.argv[1], sys.argv[1], None)
options = ReadOptions(audio_rate=16000)
list(zip(range(2), documents_in(file, options) if is_container(file, options) else document_of(file, options).read()))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
documents = documents_in(file, options) if is_container(file, options) else [document_of(file, options)]
print(sum(len(piece) for document in documents for piece in document.read()))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def big_lines(path: Path) -> int:
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
        for _ in range(5_000):
            stream.write(line.encode())
    return 50_000_000


def big_member(path: Path) -> int:
    size = 50 << 20
    with tarfile.open(path, "w") as tar:
        header = tarfile.TarInfo("big.bin")
        header.size = size
        tar.addfile(header, Zeros())
    return size


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def big_sound(path: Path) -> int:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(32_000)
        for _ in range(50):
            file.writeframes(bytes(1 << 20))
    return 25 << 20


def big_parquet(path: Path) -> int:
    schema = pa.schema({"text": pa.string()})
    with pq.ParquetWriter(path, schema, use_dictionary=False, compression="zstd") as writer:
        for _ in range(50):
            writer.write_table(pa.table({"text": ["x" * 10_000] * 100}, schema), row_group_size=10_000)
    return 50_000_000


@pytest.mark.parametrize(
    ("name", "write_it"),
    [("a.jsonl.zst", big_lines), ("a.tar", big_member), ("a.wav", big_sound), ("a.parquet", big_parquet)],
)
def test_fifty_megabytes_are_read_in_a_few(tmp_path: Path, name: str, write_it: Callable[[Path], int]):
    size = write_it(tmp_path / name)
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / name], capture_output=True, text=True, check=True)
    read_bytes, grown = map(int, done.stdout.split())
    assert read_bytes == size
    assert grown < 24, f"{grown} MiB"


def test_text_does_not_pay_for_media():
    """Nothing of the heavy libraries is imported to read text."""
    code = f"""
import sys
from data_pipeline.readers import ReadOptions, document_of
from data_pipeline.sources.listing import Selection, list_files
for file in list_files([{str(STDLIB / "json" / "decoder.py")!r}], Selection()):
    list(document_of(file, ReadOptions()).read())
print(*(name for name in ("pyarrow", "PIL", "soundfile", "soxr", "aiohttp") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
