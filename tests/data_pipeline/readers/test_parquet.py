"""Reader of Parquet files."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.documents import Document
from data_pipeline.errors import BadDocumentError
from data_pipeline.readers import ReadOptions, documents_in
from tests.data_pipeline.readers.reading import read_all, source


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


def test_dots_name_fields_of_structures(tmp_path: Path):
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
def test_a_column_of_another_type_is_named(tmp_path: Path, field: str, problem: str):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "text": ["a"]}), path)
    with pytest.raises(BadDocumentError, match=problem):
        read_all(path, field=field)


def test_damaged_parquet_is_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [os.urandom(50).hex() for _ in range(5000)]}), path, compression="zstd")
    whole = path.read_bytes()
    for damaged in (b"no parquet", whole[:-10], whole[: len(whole) // 2], b"PAR1" + os.urandom(9999) + whole[10_003:]):
        path.write_bytes(damaged)
        with pytest.raises(BadDocumentError, match=f"cannot read {path}"):
            read_all(path)
