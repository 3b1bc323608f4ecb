"""Laws of rows that belong to documents: cut, split and crop."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.stream.inspection.explain import explain
from data_pipeline.stream.mixture import Mixture, Stage
from data_pipeline.vocabulary import PADDING, SEPARATOR
from tests.conftest import prepare_corpus

T = 100
LENGTHS = [1, 3, 99, 100, 101, 199, 200, 201, 350, 999, 1000, 1001, 2500, 3700, *range(20, 260, 7)]
"""Blocks have 1,000 bytes, so some documents have several blocks."""


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    return {f"{number:03}": draw.bytes(length) for number, length in enumerate(LENGTHS)}


@pytest.fixture(scope="module")
def documents(contents: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "files").mkdir()
    for name, content in contents.items():
        (folder / "files" / name).write_bytes(content)
    return prepare_corpus([folder / "files"], folder / "out", block_bytes=1000)


def stream_of(corpus: Corpus, kind: str, *, separate: bool = True, lanes: int = 7, version: int = 3) -> ByteStream:
    packing = PackingConfig(packing="document", documents=kind, separate_documents=separate)
    return ByteStream(corpus, packing, T, lanes=lanes, seed=3, bad_blocks=0, version=version)


def epoch_of(stream: ByteStream, epoch: int) -> list[list[int]]:
    count = stream.sequences_per_epoch
    return stream.read(np.arange(epoch * count, (epoch + 1) * count)).ids.tolist()


def row(content: bytes, ends: bool, separate: bool) -> list[int]:
    return [*content, *([SEPARATOR] * (ends and separate)), *[PADDING] * T][:T]


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("kind", ["cut", "split"])
def test_an_epoch_has_every_row_of_every_document_once(documents, contents, kind: str, separate: bool):
    expected = [
        row(content[start : start + T], start + T >= len(content), separate)
        for content in contents.values()
        for start in range(0, len(content) if kind == "split" else 1, T)
    ]
    for epoch in (0, 3):
        assert sorted(epoch_of(stream_of(documents, kind, separate=separate), epoch)) == sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize("separate", [True, False])
def test_crop_is_a_range_of_its_document_at_a_different_place_in_each_epoch(documents, contents, separate: bool):
    stream = stream_of(documents, "crop", separate=separate)
    units = [[*content, *([SEPARATOR] * separate)] for content in contents.values()]
    found = [epoch_of(stream, epoch) for epoch in range(12)]
    assert all(len(rows) == len(contents) for rows in found)
    for own in units:
        if len(own) <= T:
            assert all((own + [PADDING] * T)[:T] in rows for rows in found)
            continue
        stretches = [own[start : start + T] for start in range(len(own) - T + 1)]
        starts = [stretches.index(row) for rows in found for row in rows if row in stretches]
        assert len(starts) == len(found)
        assert len(set(starts)) > (1 if len(stretches) < 8 else 4)
        if len(stretches) > 100:
            assert max(starts) - min(starts) > len(stretches) / 3


@pytest.mark.parametrize("kind", ["cut", "split", "crop"])
def test_rows_read_alone_equal_rows_read_together_and_their_origins_are_explained(documents, contents, kind: str):
    stream = stream_of(documents, kind)
    mixture = Mixture({"corpus": stream}, [Stage(0, {"corpus": 1.0})])
    count = stream.sequences_per_epoch
    for g, ids in zip(range(count, 2 * count, 3), stream.read(np.arange(count, 2 * count, 3)).ids, strict=True):
        np.testing.assert_array_equal(stream[g], ids)
        explained = np.full(T, -1)
        for origin in explain(mixture, g):
            content = contents[origin.key.removeprefix("files/")][origin.document_start :]
            explained[origin.start : origin.start + origin.length] = list(content[: origin.length])
        np.testing.assert_array_equal(np.where(ids < SEPARATOR, ids, -1), explained)


def test_an_epoch_reads_all_of_255_documents(tmp_path: Path):
    (tmp_path / "files").mkdir()
    for number in range(255):
        (tmp_path / f"files/{number:03}").write_bytes(bytes([number]) * 9)
    stream = stream_of(prepare_corpus([tmp_path / "files"], tmp_path / "out"), "cut", lanes=128)
    for epoch in range(3):
        assert sorted(row[0] for row in epoch_of(stream, epoch)) == list(range(255))
    older = stream.in_version(2)
    assert older.sequences_per_epoch == 128
    assert older.fingerprint != stream.fingerprint


def test_options_for_long_documents_need_document_packing(documents):
    with pytest.raises(ValidationError, match="documents: split needs packing: document"):
        PackingConfig(documents="split")
    prints = {stream_of(documents, kind).fingerprint for kind in ("cut", "split", "crop")}
    assert len(prints) == 3
