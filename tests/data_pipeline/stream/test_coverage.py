"""Coverage states how many documents and bytes an epoch reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.stream.inspection.coverage import coverage_of
from data_pipeline.vocabulary import SEPARATOR
from tests.conftest import Run, prepare_corpus, recipe_tree

SOUNDS, SOUND_BYTES, T = 59, 38_000, 4096


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Return a corpus of 59 documents of 38 kB."""
    folder = tmp_path_factory.mktemp("sounds")
    (folder / "files").mkdir()
    for number in range(SOUNDS):
        (folder / f"files/{number:02}").write_bytes(np.random.default_rng(number).bytes(SOUND_BYTES))
    return prepare_corpus([folder / "files"], folder / "out", level=1, block_bytes=100_000)


def stream_of(corpus: Corpus, *, version: int = 3, **packing: str) -> ByteStream:
    return ByteStream(corpus, PackingConfig(**packing), T, lanes=32, seed=0, bad_blocks=0, version=version)


@pytest.mark.parametrize("documents", ["cut", "split", "crop"])
def test_coverage_equals_what_an_epoch_reads(sounds: Corpus, documents: str):
    stream = stream_of(sounds, packing="document", documents=documents)
    coverage = coverage_of(stream)
    ids = stream.read(np.arange(stream.sequences_per_epoch)).ids
    assert coverage.documents == SOUNDS
    assert coverage.bytes == pytest.approx(np.count_nonzero(ids < SEPARATOR), rel=0.001)  # a crop may have a separator
    assert coverage.bytes == (SOUNDS * SOUND_BYTES if documents == "split" else SOUNDS * T)
    assert not coverage.is_estimate


def test_coverage_of_an_older_order_counts_the_bytes_that_it_omits(sounds: Corpus):
    coverage = coverage_of(stream_of(sounds, version=2, packing="document"))
    assert str(coverage) == "an epoch reads 32 of 59 documents and 131,072 of 2,242,000 bytes (5.8 %)"


def test_coverage_of_concatenated_documents_omits_less_than_a_row(sounds: Corpus):
    coverage = coverage_of(stream_of(sounds))
    assert coverage.documents == SOUNDS
    assert 0 < coverage.bytes_in_all - coverage.bytes < T
    assert "(99." in str(coverage)


@pytest.mark.slow
def test_coverage_is_logged_at_the_start_of_a_run_and_shown_by_status(
    byteloom: Run, corpus_folder: Path, sounds: Corpus, tmp_path: Path
):
    tree = recipe_tree(corpus_folder)
    tree["data"] = {"shards": sounds.location, "packing": "document", "lanes": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    length = tree["model"]["sequence_length"]
    text = f"an epoch reads 59 of 59 documents and {59 * length:,} of 2,242,000 bytes"
    assert text in byteloom("config", "check", "recipe.yaml", cwd=tmp_path).stdout
    assert text in byteloom("train", "recipe.yaml", "train.steps=1", cwd=tmp_path).stderr
    [run] = (tmp_path / "runs").glob("*/run.json")
    [status] = json.loads(byteloom("status", run.parent, "--json", cwd=tmp_path).stdout)
    assert status["coverage"]["corpus"]["documents"] == 59
    assert status["coverage"]["corpus"]["share"] == pytest.approx(length / SOUND_BYTES, rel=1e-4)
    assert f"corpus: {text}" in byteloom("status", run.parent, cwd=tmp_path).stdout
