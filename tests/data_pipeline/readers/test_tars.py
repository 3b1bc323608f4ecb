"""Reader of tars."""

import gzip
import io
import os
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard

from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers import ReadOptions, documents_in
from tests.data_pipeline.conftest import Real
from tests.data_pipeline.readers.reading import read, read_all, source, zstd_frames


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


def test_only_members_with_the_requested_suffixes_are_read(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({"0.txt": b"a", "0.json": b"{}", "0.seg.TXT": b"b", "txt": b"c"}))
    assert read_all(path, members=("txt",)) == {"a.tar/0.txt": b"a", "a.tar/0.seg.TXT": b"b"}
    assert read_all(path, members=("seg.txt", "json")) == {"a.tar/0.json": b"{}", "a.tar/0.seg.TXT": b"b"}


@pytest.mark.slow
def test_member_can_be_read_repeatedly_until_the_next_is_requested(tmp_path: Path):
    path = tmp_path / "a.tar"
    members = {name: os.urandom(9 << 20) for name in "abc"}
    path.write_bytes(tar_of(members))
    documents = documents_in(source(path), ReadOptions())
    first = next(documents)
    next(first.read())
    assert b"".join(first.read()) == b"".join(first.read()) == members["a"]
    next(documents)  # never read
    assert b"".join(next(documents).read()) == members["c"]
    with pytest.raises(RuntimeError, match="before the next"):
        list(first.read())


def test_links_in_a_tar_are_reported_and_folders_are_not(tmp_path: Path):
    (tmp_path / "t/deep").mkdir(parents=True)
    (tmp_path / "t/file").write_text("x")
    (tmp_path / "t/hard").hardlink_to(tmp_path / "t/file")
    (tmp_path / "t/soft").symlink_to("file")
    subprocess.run(["tar", "cf", "a.tar", "--sort=name", "t"], cwd=tmp_path, check=True)
    assert read_all(tmp_path / "a.tar") == {"a.tar/t/file": b"x", "a.tar/t/hard": "link", "a.tar/t/soft": "link"}


@pytest.mark.parametrize("writer", ["gnu", "pax"])
def test_sparse_members_of_a_tar_are_skipped(tmp_path: Path, writer: str):
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
def test_truncated_tar_yields_its_complete_members_and_then_the_error(tmp_path: Path, suffix: str):
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


def test_damage_in_the_middle_of_a_tar_is_not_taken_for_its_end(tmp_path: Path):
    """Python's tarfile would stop there and report no error."""
    whole = bytearray(tar_of({"a": b"1" * 512, "b": b"2" * 512, "c": b"3" * 512}))
    whole[1024:1034] = b"\xff" * 10  # b's name
    path = tmp_path / "a.tar"
    path.write_bytes(whole)
    found = []
    with pytest.raises(BadDocumentError, match="bad checksum"):
        found.extend(one.key for one in documents_in(source(path), ReadOptions()))
    assert found == ["a.tar/a"]


def test_bytes_after_the_end_of_a_tar_are_reported(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({"a": b"1"}) + tar_of({"b": b"2"}))
    with pytest.raises(BadDocumentError, match="has more bytes after its end"):
        read_all(path)


@pytest.mark.parametrize("content", [b"", b"no tar at all", os.urandom(2000)])
def test_file_that_is_not_a_tar_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(BadDocumentError, match=f"{path} is damaged or cut short"):
        read_all(path)


def test_media_in_a_tar_are_decoded_like_files(tmp_path: Path, real: Real):
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


def test_real_books_are_read_from_a_compressed_tar_byte_for_byte(tmp_path: Path, real: Real):
    books = real("books/valid/")
    with (
        (tmp_path / "a.tar.zst").open("wb") as file,
        zstandard.ZstdCompressor().stream_writer(file) as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        for book in books:
            tar.add(book, book.name)
    assert read_all(tmp_path / "a.tar.zst") == {f"a.tar.zst/{book.name}": book.read_bytes() for book in books}
