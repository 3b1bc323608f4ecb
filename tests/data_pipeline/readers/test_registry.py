"""Registry of readers: one file adds a reader, in this package or in another."""

import sys
from pathlib import Path

import pytest

from data_pipeline.errors import CorpusError
from data_pipeline.readers import ReadOptions
from data_pipeline.readers.registry import Reader, own_readers, reader_named, reader_names, register_reader
from tests.conftest import prepare_corpus

READER = """
from data_pipeline.readers.registry import Reader, register_reader

def shouted(stream, name, options):
    yield stream.read().upper()

register_reader(Reader("shouted", "Text in capitals.", read_file=shouted, modality="text"))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create another package with a reader and an entry point that cannot be used."""
    folder = tmp_path / "site"
    (folder / "shouting-1.dist-info").mkdir(parents=True)
    (folder / "shouting.py").write_text(READER)
    (folder / "shouting-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1\n")
    (folder / "shouting-1.dist-info/entry_points.txt").write_text(
        "[byteloom.readers]\nshouted = shouting\nbroken = shouting_not_there\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "shouting", raising=False)
    return folder


def test_every_module_of_the_folder_registers_a_reader():
    assert sorted(own_readers()) == [
        "arrow",
        "audio",
        "files",
        "images",
        "jsonl",
        "lines",
        "parquet",
        "tar",
        "webdataset",
    ]


def test_a_reader_of_another_package_is_chosen_by_name(tmp_path: Path, package: Path):
    assert reader_names()[-2:] == ["broken", "shouted"]
    (tmp_path / "t").mkdir()
    (tmp_path / "t/a.txt").write_text("quiet")
    corpus = prepare_corpus([tmp_path / "t"], tmp_path / "out", reader="shouted")
    assert corpus.read(0).content == b"QUIET\0"
    assert prepare_corpus([tmp_path / "t"], tmp_path / "auto").read(0).content == b"quiet\0"
    with pytest.raises(CorpusError, match=r"broken = shouting_not_there of shouting .* cannot be imported"):
        ReadOptions(reader="broken")
    with pytest.raises(CorpusError, match="does not use the option field"):
        ReadOptions(reader="shouted", field="body")


def test_an_unknown_reader_is_refused_with_the_nearest_name():
    with pytest.raises(CorpusError, match=r"webdatset is not the name of a reader \(did you mean webdataset\?\)"):
        reader_named("webdatset")


def test_a_reader_with_no_function_or_both_is_refused():
    with pytest.raises(ValueError, match="must have either read_file or read_container"):
        register_reader(Reader("none", "Nothing."))
