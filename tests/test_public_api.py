"""The public API: its names, and the modules that importing it imports."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import byteloom

HEAVY = {"torch", "numpy", "pydantic", "data_pipeline", "pretrain", "launchers"}


def test_import_byteloom_imports_nothing_heavy():
    script = "import sys, byteloom; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_every_public_name_exists():
    assert set(byteloom.__all__) <= set(dir(byteloom))
    for name in byteloom.__all__:
        assert getattr(byteloom, name) is not None


def test_the_version_is_that_of_the_installed_distribution():
    assert byteloom.__version__ == version("byteloom")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'byteloom' has no attribute 'prepair'"):
        byteloom.prepair  # noqa: B018


def test_a_corpus_is_prepared_and_opened(tmp_path: Path):
    (tmp_path / "source.txt").write_bytes(b"thirty bytes of a short source")
    byteloom.prepare([tmp_path / "source.txt"], tmp_path / "out", byteloom.PrepareOptions())
    with byteloom.open_corpus(tmp_path / "out") as corpus:
        assert corpus.raw_bytes == 30
        assert corpus.manifest["documents"] == 1
