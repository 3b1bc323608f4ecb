"""Keys of documents are unique in a corpus, and a key that is already unique does not change."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.corpus.blocks import pack_documents
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.index import write_shard
from data_pipeline.corpus.manifest import write_index
from data_pipeline.corpus.withdraw import withdraw
from data_pipeline.documents import Document
from data_pipeline.errors import CorpusError
from data_pipeline.preparation import keys as module
from data_pipeline.preparation.keys import ContainerKeys, FileKeys
from tests.conftest import prepare_corpus
from tests.data_pipeline.corpora import damage_block

PARTS = st.lists(
    st.sampled_from(["a", "/", "#file", "#000000000", "#000000001", "#2", "x", "#"]), min_size=1, max_size=5
)
NAMES = st.sets(PARTS.map("".join), min_size=1, max_size=12)
CONTAINED = ["#000000000", "#000000001", "/a", "/a", "/a#2", "/", "/x#000000000", "#000000000"]
"""Ends that a reader adds to the key of its container; some occur twice."""


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(corpus: Corpus) -> list[tuple[str, bytes]]:
    blocks = (corpus.read(number) for number in range(len(corpus)))
    return sorted((s.key, block.content[s.start : s.start + s.length]) for block in blocks for s in block.slices)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(NAMES, st.sets(st.integers(0, 11)), st.booleans())
def test_keys_are_unique_for_any_names(names: set[str], containers: set[int], apart: bool):
    """The files are in one source, or each is a source."""
    files = [(name, number in containers) for number, name in enumerate(sorted(names))]
    of_files = FileKeys(files if apart else [])
    found = []
    for name, contains in reversed(files) if apart else files:
        key = of_files.key_of(name, contains)
        if not contains:
            found.append(key)
            continue
        of_documents = ContainerKeys(key)
        found += [of_documents.key_of(key + rest) for rest in CONTAINED]
    assert [key for key, times in Counter(found).items() if times > 1] == []


@pytest.mark.slow
@given(st.lists(st.sampled_from(["a", "b", "a#2", "a#3", "a#2#2"]), max_size=30), st.integers(0, 9))
def test_keys_from_names_on_disk_equal_keys_from_names_in_memory(names: list[str], held: int):
    def keys() -> list[str]:
        of_documents = ContainerKeys("x.tar")
        return [of_documents.key_of(f"x.tar/{name}") for name in names]

    in_memory = keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NAMES_IN_MEMORY", held)
        assert keys() == in_memory
    assert len(set(in_memory)) == len(names)
    firsts = {name: place for place, name in reversed(list(enumerate(names)))}
    assert all(in_memory[place] == f"x.tar/{name}" for name, place in firsts.items() if "#" not in name)


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("memory", [1, 1 << 16])
def test_members_with_one_name_have_different_keys(
    tmp_path: Path, deduplicate: bool, memory: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(module, "NAMES_IN_MEMORY", memory)
    names = ["a.txt", "./a.txt", "/a.txt", "b.txt", "a.txt#2", "a.txt"]
    tar = write_tar(tmp_path / "x.tar", [(name, f"{place}".encode()) for place, name in enumerate(names)])
    corpus = prepare_corpus([tar], tmp_path / "out", deduplicate=deduplicate)
    assert documents_of(corpus) == [
        ("x.tar/a.txt", b"0"),
        ("x.tar/a.txt#2", b"1"),
        ("x.tar/a.txt#2#2", b"4"),
        ("x.tar/a.txt#3", b"2"),
        ("x.tar/a.txt#4", b"5"),
        ("x.tar/b.txt", b"3"),
    ]
    assert (
        "4 documents with the name of an earlier one; a number was added to the key, as in x.tar/a.txt#2" in caplog.text
    )
    [entry] = withdraw(corpus, ["x.tar/a.txt#3"], 1, lambda done, total: None)
    assert corpus.read(entry.block).content[entry.start : entry.stop] == b"2\0"


def test_file_named_like_a_line_has_a_different_key(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tree = tmp_path / "tree"
    tree.mkdir()
    write_jsonl(tree / "x.jsonl", ["first", "second"])
    (tree / 'x.jsonl"').write_text("between them in the order of names")
    (tree / "x.jsonl#000000000").write_text("file")
    (tree / "x.jsonl#000000000#notes").write_text("notes")
    (tree / "y.txt").write_text("y")
    (tree / "y.txt#000000000").write_text("no container is y.txt")
    expected = [
        ('x.jsonl"', b"between them in the order of names"),
        ("x.jsonl#000000000", b"first"),
        ("x.jsonl#000000000#notes", b"notes"),
        ("x.jsonl#000000001", b"second"),
        ("x.jsonl#file#000000000", b"file"),
        ("y.txt", b"y"),
        ("y.txt#000000000", b"no container is y.txt"),
    ]
    assert documents_of(prepare_corpus([tree], tmp_path / "out")) == [(f"tree/{key}", text) for key, text in expected]
    assert "1 file named like a document of another file" in caplog.text
    each = sorted(tree.iterdir(), reverse=True)
    assert documents_of(prepare_corpus(each, tmp_path / "each")) == expected


def test_a_reader_names_documents_after_their_container():
    of_documents = ContainerKeys("x.jsonl")
    for key in ("y", "x.jsonl", "x.jsonl#1", "x.json#000000000", "x.jsonl#000000000.txt"):
        with pytest.raises(ValueError, match=r"must be x\.jsonl/NAME"):
            of_documents.key_of(key)


@pytest.fixture
def repeating(tmp_path: Path) -> Path:
    """Return a corpus of an earlier version. Three documents have one key, and one of them has several blocks."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    named = [("a", b"1" * 500), ("b", b"2" * 500), ("a", b"3" * 2_500), ("c", b"4" * 500), ("a", b"5" * 100)]
    documents = [Document(key, "text", lambda content=content: iter([content])) for key, content in named]
    blocks = pack_documents(documents, 1_000, lambda document, error: None)
    shard = write_shard(folder, 0, blocks, level=3)
    assert shard is not None
    write_index(folder, [shard])
    return folder


def test_all_documents_of_a_name_are_withdrawn(repeating: Path):
    with Corpus(repeating) as corpus:
        new = withdraw(corpus, ["a"], 1, lambda done, total: None)
        read = b"".join(corpus.read(entry.block).content[entry.start : entry.stop] for entry in new)
        assert read == b"1" * 500 + b"\0" + b"3" * 2_500 + b"\0" + b"5" * 100 + b"\0"
        assert {entry.key for entry in new} == {"a"}
        assert withdraw(corpus, ["a"], 1, lambda done, total: None) == []


def test_damaged_block_may_hold_another_document_with_a_repeated_name(repeating: Path):
    damage_block(repeating, 4)  # the end of the long document, and what follows it
    with Corpus(repeating) as corpus, pytest.raises(CorpusError, match=r"document 'a'|several documents 'a'"):
        withdraw(corpus, ["a"], 1, lambda done, total: None)
