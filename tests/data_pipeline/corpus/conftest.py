"""A corpus on a server that may fail, and a copy of a corpus that a test may damage."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.corpus.corpus import Corpus
from tests.data_pipeline.corpora import write_corpus
from tests.data_pipeline.corpus.faulty_server import FaultyServer


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Return the corpus that the server serves."""
    return write_corpus(tmp_path_factory.mktemp("served") / "corpus")


@pytest.fixture(scope="module")
def expected(local: Corpus) -> list[bytes]:
    """Return the content of each block of the corpus."""
    return [local.read(block).content for block in range(len(local))]


@pytest.fixture
def server(local: Corpus) -> Iterator[FaultyServer]:
    """Serve the corpus."""
    with FaultyServer(Path(local.location)) as server:
        yield server


@pytest.fixture
def copy(original: Corpus, tmp_path: Path) -> Path:
    """Return a copy of the module's original corpus."""
    return shutil.copytree(original.location, tmp_path / "copy")
