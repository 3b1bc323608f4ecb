"""Foreign tars, Parquet files, lines and unknown kinds: each damage is named, and decodable documents are kept."""

import bz2
import codecs
import gzip
import json
import lzma
import subprocess
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.documents import Document
from data_pipeline.errors import BadDocumentError, CorpusError
from data_pipeline.preparation.prepare import PrepareReport
from data_pipeline.readers import ReadOptions, boundary, document_of, documents_in, registry, remarks
from data_pipeline.readers.boundary import check_time, guarded
from data_pipeline.readers.registry import Reader
from data_pipeline.sources.source_file import LeftOutError, SourceFile
from tests.conftest import prepare_corpus
from tests.data_pipeline.readers.reading import read, read_all, read_until_error, reason_of, source

# The boundary


def failing(error: BaseException) -> Iterator[bytes]:
    yield b"whole"
    raise error


@pytest.mark.parametrize(
    "error",
    [*(ValueError("x"), KeyError(1), RecursionError(), AssertionError()), OSError("cut"), OSError(22, "Invalid place")],
)
def test_any_exception_of_a_reader_becomes_damage_with_its_class_name(error: Exception):
    found = guarded(failing(error), "a.file")
    assert next(found) == b"whole"
    with pytest.raises(BadDocumentError, match=rf"^a.file cannot be read: {type(error).__name__}"):
        next(found)


@pytest.mark.parametrize(
    "error",
    [
        *(ConnectionResetError(), TimeoutError(), OSError(5, "Input/output error"), MemoryError()),
        *(CorpusError("named"), LeftOutError("unreadable", "named"), KeyboardInterrupt()),
    ],
)
def test_errors_of_transport_memory_and_interrupts_pass_the_boundary_unchanged(error: BaseException):
    with pytest.raises(type(error)) as caught:
        list(guarded(failing(error), "a.file"))
    assert caught.value is error


def test_reader_that_exceeds_the_time_limit_is_damage(monkeypatch: pytest.MonkeyPatch):
    def endless() -> Iterator[bytes]:
        yield b"piece"
        monkeypatch.setattr(boundary, "DOCUMENT_SECONDS", -1)
        yield b"piece"
        while True:
            check_time()

    found = guarded(endless(), "a.file")
    assert [next(found), next(found)] == [b"piece"] * 2
    with pytest.raises(BadDocumentError, match=r"a\.file cannot be read: it took longer than -1 seconds"):
        next(found)
    check_time()  # the limit ends with the reader


@pytest.mark.parametrize("name", ["a.gz", "a.tar", "a.parquet", "a.png"])
def test_readers_check_the_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    writers: dict[str, Callable[[Path], object]] = {
        "a.gz": lambda path: path.write_bytes(gzip.compress(b"x")),
        "a.tar": lambda path: path.write_bytes(tar_of(("a", b"x"))),
        "a.parquet": lambda path: pq.write_table(pa.table({"text": ["x"]}), path),
        "a.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    }
    writers[name](tmp_path / name)
    monkeypatch.setattr(boundary, "DOCUMENT_SECONDS", -1)
    with pytest.raises(BadDocumentError, match="took longer than"):
        (read_all if name in ("a.tar", "a.parquet") else read)(tmp_path / name)


def test_an_exception_of_a_foreign_container_reader_is_counted_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def documents(file: SourceFile, options: ReadOptions) -> Iterator[Document]:
        yield Document(f"{file.key}/good", "text", lambda: iter([b"good"]))
        yield Document(f"{file.key}/bad", "text", lambda: failing(ZeroDivisionError("a bug")))
        raise KeyError("another")

    monkeypatch.setattr(registry._registry, "get", lambda name: Reader(name, "", read_container=documents))
    (tmp_path / "a.x").write_bytes(b"x")
    corpus = prepare_corpus([tmp_path / "a.x"], tmp_path / "out", reader="foreign", skip_bad=True)
    assert corpus.read(0).content == b"good\0"
    details = [json.loads(line)["detail"] for line in (tmp_path / "out/skipped.jsonl").open()]
    assert ["ZeroDivisionError: a bug" in details[0], "KeyError: 'another'" in details[1]] == [True, True]


# Tars


def tar_of(*members: tuple[str, bytes], end: bool = True, **pax: str) -> bytes:
    """Return a tar in which each member has these PAX records."""
    content = b""
    for name, data in members:
        header = tarfile.TarInfo(name)
        header.size, header.pax_headers = len(data), pax
        content += header.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)
    return content + bytes(1024) * end


def test_sparse_member_with_a_damaged_map_is_skipped_and_later_members_are_read(tmp_path: Path):
    sparse = tar_of(("b", b"x"), end=False, **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
    (tmp_path / "t.tar").write_bytes(tar_of(("a", b"1"), end=False) + sparse + tar_of(("c", b"3")))
    assert read_all(tmp_path / "t.tar") == {"t.tar/a": b"1", "t.tar/b": "sparse", "t.tar/c": b"3"}


@pytest.mark.parametrize("reader", ["auto", "webdataset"])
@pytest.mark.parametrize("suffix", [".tar", ".tgz"])
@pytest.mark.parametrize("members", [None, ("other",)])
def test_a_member_that_states_two_to_the_sixty_bytes_ends_the_tar(tmp_path: Path, reader, suffix: str, members):
    header = tarfile.TarInfo("a.txt")
    header.size = 1 << 60
    content = tar_of(("0.txt", b"first"), end=False) + header.tobuf(tarfile.GNU_FORMAT) + b"hello"
    path = tmp_path / f"t{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".tgz" else content)
    found, error = read_until_error(path, reader=reader, members=members) if members else first_of(path, reader)
    assert "is damaged or cut short" in error
    assert b"hello" not in found.values()


def first_of(path: Path, reader: str) -> tuple[dict[str, bytes], str]:
    """Return the documents until one cannot be read, and the error."""
    found = {}
    with pytest.raises(BadDocumentError) as caught:
        for one in documents_in(source(path), ReadOptions(reader=reader)):
            assert isinstance(one, Document)
            found[one.key] = b"".join(one.read())
    if reader == "auto":  # the reader of WebDataset cannot know whether the sample before the damage is complete
        assert list(found.values()) == [b"first"]
    return found, str(caught.value)


def test_a_header_that_states_a_gigabyte_of_names_is_damage(tmp_path: Path):
    header = tarfile.TarInfo("names")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    (tmp_path / "t.tar").write_bytes(tar_of(("a", b"1"), end=False) + header.tobuf(tarfile.GNU_FORMAT) + b"x" * 2000)
    found, error = read_until_error(tmp_path / "t.tar")
    assert found == {"t.tar/a": b"1"}
    assert "a header states 1,073,741,824 bytes of names" in error


def test_tar_without_an_end_mark_does_not_lose_its_members(tmp_path: Path):
    (tmp_path / "t.tar").write_bytes(tar_of(("a", b"1"), ("b", b"2"), end=False))
    found, error = read_until_error(tmp_path / "t.tar")
    assert found == {"t.tar/a": b"1", "t.tar/b": b"2"}
    assert "its end mark is missing" in error


@pytest.mark.parametrize("rest", [b"", bytes(1024)])
def test_pax_header_without_a_member_does_not_lose_earlier_members(tmp_path: Path, rest: bytes):
    only = tar_of(("b", b"2"), comment="x")[:1024]  # the header and its records
    (tmp_path / "t.tar").write_bytes(tar_of(("a", b"1"), end=False) + only + rest)
    found, error = read_until_error(tmp_path / "t.tar")
    assert found == {"t.tar/a": b"1"}
    assert "is damaged or cut short" in error


@pytest.mark.parametrize("suffix", [".tgz", ".tar.xz", ".tar.bz2", ".tbz2", ".txz"])
def test_junk_after_a_compressed_tar_does_not_lose_its_members(tmp_path: Path, suffix: str):
    compress = gzip.compress if "g" in suffix else bz2.compress if "b" in suffix else lzma.compress
    path = tmp_path / f"t{suffix}"
    path.write_bytes(compress(tar_of(("a", b"1"), ("b", b"2"))))
    assert read_all(path) == {f"t{suffix}/a": b"1", f"t{suffix}/b": b"2"}
    path.write_bytes(path.read_bytes() + b"junk that is no frame")
    found, error = read_until_error(path)
    assert found == {f"t{suffix}/a": b"1", f"t{suffix}/b": b"2"}
    assert "cannot be decompressed" in error


@pytest.mark.slow
@given(content=st.binary(min_size=1, max_size=200), at=st.integers(0, 4095), end=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_damaged_tar_raises_only_the_error_for_damage(tmp_path_factory, content: bytes, at: int, end: bool):
    path = tmp_path_factory.mktemp("t") / "t.tar"
    whole = bytearray(tar_of(("a", b"1" * 600), ("b", b"2"), comment="x", path="b", end=end))
    whole[at : at + len(content)] = content
    path.write_bytes(whole)
    try:
        for one in documents_in(source(path), ReadOptions(reader="tar")):
            if isinstance(one, Document):
                list(one.read())
    except BadDocumentError as error:
        assert str(path) in str(error)


# Parquet


def test_a_column_name_that_is_not_utf8_is_damage(tmp_path: Path):
    pq.write_table(pa.table({"tXt": ["a"], "text": ["b"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes().replace(b"tXt", b"t\xfft"))
    with pytest.raises(BadDocumentError, match=r"cannot read .*a.parquet: UnicodeDecodeError"):
        read_all(tmp_path / "a.parquet")


def test_a_page_whose_checksum_is_wrong_is_damage(tmp_path: Path):
    path = tmp_path / "a.parquet"
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pq.write_table(pa.table({"text": ["hello world"]}), path, **plain)
    assert list(read_all(path).values()) == [b"hello world"]
    path.write_bytes(path.read_bytes().replace(b"hello", b"jello"))
    with pytest.raises(BadDocumentError, match="CRC checksum verification failed"):
        read_all(path)


def test_json_and_uuid_columns_are_read_as_they_are_stored(tmp_path: Path):
    rows = {"j": pa.array(['{"a": 1}'], pa.json_()), "u": pa.array([uuid.UUID(int=5).bytes], pa.uuid())}
    inner = pa.StructArray.from_arrays([rows["j"]], ["j"])
    pq.write_table(pa.table({**rows, "s": inner}), tmp_path / "a.parquet")
    read_field = lambda field: list(read_all(tmp_path / "a.parquet", field=field).values())  # noqa: E731
    assert read_field("j") == read_field("s.j") == [b'{"a": 1}']
    assert read_field("u") == [uuid.UUID(int=5).bytes]


@pytest.mark.parametrize("field", ["l", "m", "s", "s.l", "l.list.element"])
def test_lists_maps_and_structs_are_refused_by_name(tmp_path: Path, field: str):
    pairs = pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"l": [["a"]], "m": pairs, "s": [{"l": ["x"]}]}), tmp_path / "a.parquet")
    with pytest.raises(BadDocumentError, match=r"has type (list|map|struct)<.*(not supported)"):
        read_all(tmp_path / "a.parquet", field=field)


# Lines and JSON

LINES = b'{"text": "a"}\n{"text": "b"}\n'


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma.compress), (".bz2", bz2.compress)])
def test_xz_and_bzip2_are_decompressed(tmp_path: Path, suffix: str, compress):
    lines, text = tmp_path / f"a.jsonl{suffix}", tmp_path / f"a.txt{suffix}"
    lines.write_bytes(compress(LINES[:14]) + compress(LINES[14:]))  # two streams
    assert list(read_all(lines).values()) == [b"a", b"b"]
    text.write_bytes(compress(b"content"))
    assert read(text) == b"content"
    assert document_of(source(text), ReadOptions()).modality == "text"
    for damaged in (compress(b"content")[:-3], b"no such thing", compress(b"content") + b"junk"):
        text.write_bytes(damaged)
        assert reason_of(text)[0] == "damaged"


def test_the_longest_window_of_zstd_is_read(tmp_path: Path):
    packed = subprocess.run(["zstd", "--long=31", "-c"], input=LINES, capture_output=True, check=True).stdout
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert list(read_all(tmp_path / "a.jsonl.zst").values()) == [b"a", b"b"]


def test_huge_integer_in_another_field_does_not_drop_its_line(tmp_path: Path):
    number = b"9" * 5000
    (tmp_path / "a.jsonl").write_bytes(
        b'{"id": ' + number + b', "text": "a"}\n{"text": ' + number + b'}\n{"id": ' + number + b', "text": '
    )
    assert list(read_all(tmp_path / "a.jsonl").values()) == [b"a", "no field", "damaged"]


@pytest.mark.parametrize("raw", [b"\xed\xa0\x80", b"\xff", b"\xc0\xaf", b"\xe2\x82"])
def test_json_that_is_not_utf8_is_damage(tmp_path: Path, raw: bytes):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x' + raw + b'"}\n' + LINES)
    assert list(read_all(tmp_path / "a.jsonl").values()) == ["damaged", b"a", b"b"]


@pytest.mark.parametrize("mark", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("reader", ["jsonl", "lines"])
def test_lines_with_a_byte_order_mark_are_read_in_its_encoding(tmp_path: Path, mark: str, reader: str):
    texts = ["grüße 😀", "\u0a0a\u0d0a", "x" * 70_000]  # characters whose bytes look like line ends
    lines = [json.dumps({"text": text}, ensure_ascii=False) if reader == "jsonl" else text for text in texts]
    (tmp_path / "a.txt").write_bytes(f"\ufeff{lines[0]}\r\n{lines[1]}\n{lines[2]}".encode(mark))
    expected = [text.encode() for text in texts]
    if (mark, reader) == ("utf-8", "lines"):  # bytes of plain lines in UTF-8 do not change
        expected[0] = codecs.BOM_UTF8 + expected[0]
    assert list(read_all(tmp_path / "a.txt", reader=reader).values()) == expected


@pytest.mark.slow
def test_damaged_utf16_does_not_lose_earlier_lines(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + LINES.decode() * 20_000).encode("utf-16-le") + b"\0\xd8\n\0")
    found, error = read_until_error(tmp_path / "a.jsonl")
    assert set(found.values()) == {b"a", b"b"}
    assert f"{tmp_path}/a.jsonl cannot be read: UnicodeDecodeError" in error


@pytest.mark.slow
@given(lines=st.lists(st.text(st.sampled_from("a\r"), max_size=4), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_only_lf_and_cr_lf_end_a_line(tmp_path_factory, lines: list[str]):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    *ended, last = lines
    kept = [line.removesuffix("\r") for line in ended] + [last] * bool(last)
    assert list(read_all(path, reader="lines").values()) == [line.encode() or "empty" for line in kept]


# Kinds by content

UNKNOWN = {
    "a.avif": b"\0\0\0\x20ftypavif",
    "a.heic": b"\0\0\0\x18ftypheic",
    "a.m4a": b"\0\0\0\x20ftypM4A ",
    "a.jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
    "a.h5": b"\x89HDF\r\n\x1a\n",
    "a.arrow": b"ARROW1\0\0",
    "a.gguf": b"GGUF\3\0\0\0",
    "a.safetensors": b"\x08\0\0\0\0\0\0\0{}      ",
    "a.sqlite": b"SQLite format 3\0",
    "a.tga": b"\0\0\2\0\0\0\0\0\0\0\0\0\1\0\1\0\x18\0abc",
    "a.unknown": b"%PDF-1.7 without a NUL",
    "README": b"BZh91AY&SY",
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("compressed", [False, True])
def test_binary_content_under_an_unknown_suffix_is_binary(tmp_path: Path, caplog, name: str, compressed: bool):
    path = tmp_path / (f"{name}.gz" if compressed else name)
    path.write_bytes(gzip.compress(UNKNOWN[name]) if compressed else UNKNOWN[name])
    document = document_of(source(path), ReadOptions())
    assert b"".join(document.read()) == UNKNOWN[name]
    assert document.modality == "binary"
    assert not caplog.messages  # no suffix disagrees
    given_modality = document_of(source(path), ReadOptions(modality="text"))
    list(given_modality.read())
    assert given_modality.modality == "text"


def test_text_stays_text_in_every_encoding(tmp_path: Path):
    for number, content in enumerate((b"plain", "grüße".encode("latin-1"), "\ufeffx".encode("utf-16-le"), b"RIF")):
        (tmp_path / f"{number}").write_bytes(content)
        document = document_of(source(tmp_path / f"{number}"), ReadOptions())
        list(document.read())
        assert document.modality == "text"


def test_a_suffix_that_disagrees_with_the_content_is_reported(tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remarks.Remarks, "_files", 0)
    (tmp_path / "a.py").write_bytes(b"x\0y")
    document = document_of(source(tmp_path / "a.py"), ReadOptions())
    list(document.read())
    assert document.modality == "binary"
    assert caplog.messages == [
        f"{tmp_path}/a.py was decoded with a warning: its suffix is that of code, and its content is binary"
    ]


def test_members_of_tars_have_the_modality_of_their_content(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(tar_of(("0.avif", UNKNOWN["a.avif"]), ("0.txt", b"text")))
    for reader, expected in (("auto", ["binary", "text"]), ("webdataset", ["binary"])):
        found = []
        for document in documents_in(source(tmp_path / "a.tar"), ReadOptions(reader=reader)):
            assert isinstance(document, Document)
            list(document.read())
            found.append(document.modality)
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("deduplicate", [False, True])
def test_kind_skips_documents_of_other_kinds_and_the_report_counts_them(tmp_path: Path, deduplicate: bool):
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "a.py").write_text("x = 1\n")
    (tree / "b.py").write_bytes(b"x\0")  # binary in fact
    (tree / "README.md").write_text("text")
    (tree / "deep/logo.png").write_bytes(b"a picture that is not decoded")
    (tree / "lines.jsonl").write_bytes(LINES)
    (tree / "members.tar").write_bytes(tar_of(("c.py", b"y = 2\n"), ("d.txt", b"text"), ("e.png", b"picture")))
    corpus = prepare_corpus([tree], tmp_path / "out", kinds=("code",), deduplicate=deduplicate)
    assert sorted(part.key for part in corpus.read(0).slices) == ["tree/a.py", "tree/members.tar/c.py"]
    report = PrepareReport.load(tmp_path / "out/report.json")
    assert [(kind.suffix, kind.modality, kind.documents, kind.raw_bytes) for kind in report.kinds] == [
        (".py", "code", 2, 12)
    ]
    left_out = {kind.suffix: (kind.reason, kind.documents) for kind in report.left_out_kinds}
    expected = {".py": 1, ".md": 1, ".png": 2, ".jsonl": 2, ".txt": 1}
    assert left_out == {suffix: ("other kind", number) for suffix, number in expected.items()}
    assert report.left_out == 7
