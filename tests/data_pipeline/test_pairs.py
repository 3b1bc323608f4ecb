"""Pairs: a document holds a source and a target of any bytes, and a row gives both back."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import CorpusError
from data_pipeline.pairs import joined, pair_of
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.vocabulary import PADDING, SEPARATOR
from tests.conftest import prepare_corpus

BYTES = st.binary(max_size=40)


@given(BYTES, BYTES, st.integers(0, 90))
def test_row_gives_back_what_it_has_of_a_pair(source: bytes, target: bytes, room: int):
    whole = [*joined(source, target), SEPARATOR]
    row = np.full(max(room, 1), PADDING, np.int16)
    kept = whole[: len(row)]
    row[: len(kept)] = kept
    begin = len(str(len(source))) + 1
    if len(row) < begin:  # not even the length fits
        with pytest.raises(CorpusError, match="is no pair"):
            pair_of(row)
        return
    pair = pair_of(row)
    assert pair.source.tolist() == kept[begin : begin + len(source)]
    assert pair.target.tolist() == kept[begin + len(source) + 1 :]


@given(BYTES, BYTES, st.data())
def test_pair_of_a_row_with_a_hole_is_what_comes_before_the_hole(source: bytes, target: bytes, data: st.DataObject):
    whole = [*joined(source, target), SEPARATOR]
    row = np.array([*whole, PADDING], np.int16)
    hole = data.draw(st.integers(1, len(whole) - 1))
    row[hole : data.draw(st.integers(hole + 1, len(whole)))] = PADDING
    begin = len(str(len(source))) + 1
    pair = pair_of(row)
    assert pair.source.tolist() == whole[begin : min(hole, begin + len(source))]
    assert pair.target.tolist() == whole[begin + len(source) + 1 : hole]


@pytest.mark.parametrize("content", [b"plain text", b":", b"3:abcd", b"x3:abc,d", b"", b"1234567890123:a"])
def test_document_that_is_no_pair_is_refused(content: bytes):
    row = np.array([*content, PADDING], np.int16)
    with pytest.raises(CorpusError, match=r"is no pair of a source and a target"):
        pair_of(row)


def test_lines_of_two_fields_become_pairs(tmp_path: Path):
    pairs = [("hä", "HÄ"), ("", "empty source"), ("a\n:,", "b"), ("no target", "")]
    lines = [json.dumps({"in": {"text": source}, "out": target}) for source, target in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join([*lines, json.dumps({"in": {"text": "x"}, "out": "y"})]))
    corpus = prepare_corpus([tmp_path / "pairs.jsonl"], tmp_path / "corpus", field="in.text", target_field="out")
    stream = ByteStream(corpus, PackingConfig(packing="document"), 24, lanes=1, seed=0, bad_blocks=0)
    found = {tuple(bytes(part[part < SEPARATOR].astype(np.uint8)) for part in pair_of(stream[g])) for g in range(4)}
    assert found == {(a.encode(), b.encode()) for a, b in [*pairs[:3], ("x", "y")]}
