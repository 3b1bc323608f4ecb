"""Reader of Arrow files of the datasets library."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipeline.errors import BadDocumentError
from tests.data_pipeline.readers.reading import read_all


def write(path: Path, table: pa.Table, batch_rows: int = 300) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=batch_rows)


def test_each_row_is_a_document(tmp_path: Path):
    path = tmp_path / "a.arrow"
    rows = [f"row {number} ✓" for number in range(1000)]
    rows[3], rows[500] = None, ""
    write(path, pa.table({"id": range(1000), "text": rows}))
    found = read_all(path)
    assert list(found) == [f"a.arrow#{number:09d}" for number in range(1000)]
    assert (found["a.arrow#000000003"], found["a.arrow#000000500"]) == ("no field", "empty")
    assert [text for text in found.values() if isinstance(text, bytes)] == [row.encode() for row in rows if row]


def test_dots_name_fields_of_structures(tmp_path: Path):
    path = tmp_path / "a.arrow"
    write(path, pa.Table.from_pylist([{"id": 1, "meta": {"text": "a"}}, {"id": 2, "meta": None}]))
    assert list(read_all(path, field="meta.text").values()) == [b"a", "no field"]


def test_damaged_arrow_is_named(tmp_path: Path):
    path = tmp_path / "a.arrow"
    write(path, pa.table({"text": [os.urandom(50).hex() for _ in range(5000)]}))
    whole = path.read_bytes()
    assert len(read_all(path)) == 5000
    for damaged in (b"no arrow", whole[:-8], whole[:-10], whole[: len(whole) // 2], whole + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(BadDocumentError, match=str(path)):
            read_all(path)


@pytest.mark.slow
def test_folder_that_datasets_has_saved_is_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    [path] = (tmp_path / "saved").glob("*.arrow")
    assert list(read_all(path).values()) == [b"one", b"two"]
