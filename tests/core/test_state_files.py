"""Error messages for damaged state files: one line with the file, the fault and the advice."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from byteloom.core.storage.state_files import StateFileError, read_json, read_lines, read_yaml


@dataclass(frozen=True)
class Note:
    name: str
    count: int
    hosts: Sequence[str] = ()


DAMAGE = {
    "empty": (b"", "it is empty"),
    "zero bytes": (b"\0\0\0\0", "it holds only zero bytes, as after a loss of power"),
    "half": (b'{"name": "a", "cou', "it is not JSON (Unterminated string starting at: line 1 column 15 (char 14))"),
    "not UTF-8": (b'{"name": "\xff", "count": 1}', "it is not UTF-8 text"),
    "another program's": (b"PK\x03\x04\x14", "it is not JSON (Expecting value: line 1 column 1 (char 0))"),
    "too deep": (
        b"[" * 100_000,
        "it is not JSON (maximum recursion depth exceeded",
    ),
    "a list": (b"[1, 2]", "it is [1, 2], but it should be an object"),
    "a number": (b"7", "it is 7, but it should be an object"),
    "without a field": (b'{"name": "a"}', "count is missing in it"),
    "of a wrong type": (b'{"name": "a", "count": [7]}', "count is [7], but input should be a valid integer"),
}


@pytest.mark.parametrize(("content", "fault"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_json_file_gives_one_line_with_file_fault_and_advice(content: bytes, fault: str, tmp_path: Path):
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with pytest.raises(StateFileError) as caught:
        read_json(path, Note, "write it again")
    assert re.fullmatch(rf"{path} is damaged: {re.escape(fault)}.*; write it again", str(caught.value))


def test_intact_file_is_read_and_fields_of_a_newer_version_are_ignored(tmp_path: Path):
    path = tmp_path / "note.json"
    path.write_text('{"name": "é", "count": 7, "hosts": ["a\\udcff"], "mood": "good"}', encoding="utf-8")
    assert read_json(path, Note, "") == Note("é", 7, ["a\udcff"])  # the name of a file that is no UTF-8
    assert read_json(tmp_path / "other.json", Note, "") is None


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "it is empty"),
        (b"\0\0", "it holds only zero bytes, as after a loss of power"),
        (b"a: [1, 2", "it is not YAML (did not find expected ',' or ']')"),
        (b"name: a\0\ncount: 1", "it is not YAML (ReaderError)"),
        (b"? [1, 2]\n: 3", "it is not YAML (found unhashable key)"),
        (b"plain words", 'it is "plain words", but it should be an object'),
        (
            b"name: a\ncount: many",
            'count is "many", but input should be a valid integer',
        ),
    ],
)
def test_damaged_yaml_file_gives_one_line(content: bytes, fault: str, tmp_path: Path):
    path = tmp_path / "note.yaml"
    path.write_bytes(content)
    with pytest.raises(StateFileError) as caught:
        read_yaml(path, Note, "write it again")
    assert re.fullmatch(rf"{path} is damaged: {re.escape(fault)}.*; write it again", str(caught.value))
    path.write_text("name: a\ncount: 7\n")
    assert read_yaml(path, Note, "") == Note("a", 7)


def test_unreadable_path_is_named(tmp_path: Path):
    with pytest.raises(StateFileError, match=f"{tmp_path} cannot be read: Is a directory"):
        read_json(tmp_path, Note, "")
    with pytest.raises(StateFileError, match=f"{tmp_path} cannot be read: Is a directory"):
        next(read_lines(tmp_path, Note))


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become another user")
def test_file_of_another_user_is_named(tmp_path: Path):
    path = tmp_path / "note.json"
    path.write_text("{}")
    path.chmod(0o600)
    script = """
import os, pathlib
from byteloom.core.storage.state_files import StateFileError, read_json
os.seteuid(65534)
try:
    read_json(pathlib.Path("note.json"), dict, "")
except StateFileError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    message = "note.json cannot be read: Permission denied; get the right to read it from its owner\n"
    assert done.stdout == message, done.stderr


ONE, TWO, THREE = (f'{{"name": "{name}", "count": {n}}}'.encode() for n, name in enumerate("abc", 1))


@pytest.mark.parametrize(
    ("content", "counts", "faults"),
    [
        (ONE + b"\n" + TWO + b"\n", [1, 2], []),
        (ONE + b"\n" + TWO, [1], []),  # still being written
        (
            ONE + b"\n" + b"\0" * 5 + TWO + b"\n" + THREE + b"\n",
            [1, 2, 3],
            ["line 2: 5 bytes before its value belong to no line"],
        ),
        (ONE + b"\n" + TWO[:9] + THREE + b"\n", [1, 3], ["line 2: 9 bytes before its value belong to no line"]),
        (ONE[:9] + b"\n" + TWO + b"\n\n" + THREE + b"\n", [2, 3], ["line 1: it is not JSON", "line 3: it is empty"]),
        (
            ONE + b"\n[]\n" + b"\0" * 5 + b"\n" + THREE + b"\n",
            [1, 3],
            ["line 2: it is []", "line 3: it holds only zero"],
        ),
        (b"", [], []),
    ],
)
def test_damaged_lines_are_numbered_and_the_other_lines_are_read(
    content: bytes, counts: list, faults: list, tmp_path: Path
):
    path = tmp_path / "notes.jsonl"
    path.write_bytes(content)
    lines = list(read_lines(path, Note))
    assert [line.value.count for line in lines if line.value is not None] == counts
    found = [line.fault for line in lines if line.fault]
    assert len(found) == len(faults)
    for fault, expected in zip(found, faults, strict=True):
        assert fault.startswith(f"{path} is damaged in {expected}")
    for line, after in pairwise(lines):  # the end of a line is the start of the next
        assert next(read_lines(path, Note, line.end)) == after
