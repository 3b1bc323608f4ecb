"""Readers of lines and JSON lines."""

import json
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.documents import READ_BYTES, Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers import ReadOptions, documents_in
from data_pipeline.readers.formats import lines
from data_pipeline.readers.formats.text import utf8
from data_pipeline.sources.source_file import Skipped
from tests.data_pipeline.readers.reading import COMPRESSED, read_all, source


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
def test_json_lines_return_every_text(tmp_path_factory, texts: list[str]):
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
def test_json_lines_are_recognized_by_their_suffix(tmp_path: Path, suffix: str):
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


def test_truncated_file_of_lines_yields_its_complete_lines_and_then_the_error(tmp_path: Path):
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
