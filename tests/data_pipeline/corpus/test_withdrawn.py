"""List of withdrawn documents: entries are never lost, and a list that does not belong to the corpus is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.corpus.blocks import pack_documents
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.index import write_shard
from data_pipeline.corpus.manifest import write_index
from data_pipeline.corpus.repair import repair
from data_pipeline.corpus.storage.remote import RemoteConfig
from data_pipeline.corpus.tar import shard_name
from data_pipeline.corpus.verify import verify
from data_pipeline.corpus.withdraw import withdraw
from data_pipeline.corpus.withdrawn import WITHDRAWN_FILE, Withdrawal, prefix_digest, write_withdrawn
from data_pipeline.documents import Document
from data_pipeline.errors import CorpusError
from tests.conftest import Run
from tests.data_pipeline.corpora import damage_block, flip, write_corpus
from tests.data_pipeline.corpus.faulty_server import FaultyServer

FAST = RemoteConfig(attempts=4, backoff_seconds=0.001, timeout_seconds=20)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("withdrawn") / "original")


@pytest.fixture
def folder(original: Corpus, tmp_path: Path) -> Path:
    return shutil.copytree(original.location, tmp_path / "corpus")


def take_out(folder: Path, *keys: str) -> list[Withdrawal]:
    with Corpus(folder, check_shards=False) as corpus:
        return withdraw(corpus, keys, threads=2, progress=lambda done, total: None)


def listed(folder: Path | str, remote: RemoteConfig | None = None) -> list[Withdrawal]:
    with Corpus(folder, check_shards=False, remote=remote) as corpus:
        return corpus.withdrawn


def faults(folder: Path) -> list[str]:
    return verify(folder, threads=2, progress=lambda done, total: None)


def parts_of(corpus: Corpus, key: str) -> list[Withdrawal]:
    return [
        Withdrawal(key, number, part.start, part.start + part.length + part.ends)
        for number in range(len(corpus))
        for part in corpus.read(number).slices
        if part.key == key
    ]


@pytest.mark.slow
def test_the_list_has_every_part_of_a_document_and_only_grows(original: Corpus, folder: Path):
    assert listed(folder) == []
    first, second = take_out(folder, "email/header.py"), take_out(folder, "long", "email/header.py")
    assert first == parts_of(original, "email/header.py")
    assert second == parts_of(original, "long")
    assert len(second) > 11  # through several blocks and two shards
    assert listed(folder) == first + second
    assert take_out(folder, "long") == []
    assert listed(folder) == first + second
    assert faults(folder) == []
    digests = {prefix_digest(listed(folder), count) for count in range(len(first + second) + 1)}
    assert len(digests) == len(first + second) + 1
    assert prefix_digest(listed(folder), len(first)) == prefix_digest(first, len(first))


@pytest.mark.slow
def test_list_with_any_changed_byte_is_refused(folder: Path):
    take_out(folder, "email/header.py", "long")
    path = folder / WITHDRAWN_FILE
    whole = path.read_bytes()
    shorter = json.loads(whole)
    del shorter["entries"][-1]
    damaged = [b"", b"null", b"[]", whole[:-1], whole + b"\n", whole[: len(whole) // 2], json.dumps(shorter).encode()]
    places = range(3, len(whole), len(whole) // 40)
    damaged += [whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :] for place in places]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=r"withdrawn.json is damaged"):
            listed(folder)
        with pytest.raises(CorpusError, match=r"withdrawn.json is damaged"):
            take_out(folder, "email/utils.py")
        assert path.read_bytes() == content
    [fault] = faults(folder)
    assert "withdrawn.json is damaged" in fault


@pytest.mark.slow
def test_a_list_of_another_corpus_and_one_of_places_outside_the_blocks_are_refused(folder: Path, tmp_path: Path):
    write_corpus(tmp_path / "other", block_bytes=5_000)
    take_out(tmp_path / "other", "long")
    shutil.copy(tmp_path / "other" / WITHDRAWN_FILE, folder / WITHDRAWN_FILE)
    with pytest.raises(CorpusError, match="it is the list of another corpus"):
        listed(folder)
    with Corpus(folder) as corpus:
        size, blocks = len(corpus.read(0).content), len(corpus)
        for block, start, stop in [(0, 0, size + 1), (0, 5, 5), (0, -1, 5), (blocks, 0, 1), (-1, 0, 1)]:
            write_withdrawn(Path(corpus.location), corpus.content_sha256, [Withdrawal("key", block, start, stop)])
            with pytest.raises(CorpusError, match="is not inside a block"):
                listed(folder)


@pytest.mark.parametrize("lost", ["index.npy", "lengths.npy", "manifest.json"])
def test_the_list_is_verified_when_the_index_is_lost_too(folder: Path, lost: str):
    take_out(folder, "long")
    (folder / lost).unlink()
    assert len(faults(folder)) == 1
    flip(folder / WITHDRAWN_FILE, 200)
    other, fault = faults(folder)
    assert lost in other or "manifest.json" in other
    assert "withdrawn.json is damaged" in fault


@pytest.mark.slow
def test_damaged_list_is_restored_from_the_mirror(folder: Path, tmp_path: Path):
    def mend(mirror: Path | None) -> list[str]:
        return repair(folder, str(mirror) if mirror else None, threads=2, progress=lambda done, total: None)

    bare = shutil.copytree(folder, tmp_path / "bare")
    entries = take_out(folder, "long")
    mirror = shutil.copytree(folder, tmp_path / "mirror")
    take_out(folder, "email/header.py")
    flip(folder / WITHDRAWN_FILE, 200)
    flip(folder / shard_name(2), 0)
    with pytest.raises(CorpusError, match=r"withdrawn.json is damaged(.|\n)*--mirror"):
        mend(None)
    assert len(faults(folder)) == 1  # everything else is intact
    with pytest.raises(CorpusError, match="has no list either"):
        mend(bare)
    [said] = mend(mirror)
    assert "with 1 document; withdraw again" in said
    assert listed(folder) == entries
    assert faults(folder) == []


@pytest.mark.parametrize("fault", ["short", "flip", "drop", "elsewhere"])
def test_list_at_a_url_is_requested_until_it_is_intact(folder: Path, fault: str):
    entries = take_out(folder, "long")
    with FaultyServer(folder) as server:
        answers = iter([fault, fault])
        server.fault_of = lambda name: next(answers, None) if name == WITHDRAWN_FILE else None
        assert listed(server.url, FAST) == entries
        server.fault_of = lambda name: fault if name == WITHDRAWN_FILE else None
        with pytest.raises(CorpusError, match=WITHDRAWN_FILE):
            listed(server.url, FAST)


def test_list_without_a_document_is_valid(folder: Path):
    assert take_out(folder) == []
    assert (folder / WITHDRAWN_FILE).exists()
    assert listed(folder) == []
    assert faults(folder) == []


def test_nothing_is_read_if_a_server_does_not_say_whether_there_is_a_list(folder: Path):
    with FaultyServer(folder) as server:
        assert listed(server.url, FAST) == []
        server.forbidden.add(WITHDRAWN_FILE)
        with pytest.raises(CorpusError, match=r"403.*s3:ListBucket.*--list /dev/null"):
            listed(server.url, FAST)


WITHDRAW = """
import sys
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.withdraw import withdraw
print(flush=True)
input()
for key in sys.argv[2:]:
    withdraw(Corpus(sys.argv[1]), [key], 1, lambda done, total: None)
"""


@pytest.mark.slow
def test_no_withdrawal_of_several_at_once_is_lost(folder: Path, original: Corpus):
    keys = sorted({part.key for number in range(len(original)) for part in original.read(number).slices})
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    at_once = [
        subprocess.Popen([sys.executable, "-c", WITHDRAW, folder, *keys[number::4]], **pipes) for number in range(4)
    ]
    for process in at_once:
        process.stdout.readline()
    for process in at_once:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in at_once:
        _, said = process.communicate()
        assert process.returncode == 0, said.decode()
    assert {entry.key for entry in listed(folder)} == set(keys)


def test_document_can_be_withdrawn_despite_damage_elsewhere(folder: Path, original: Corpus):
    elsewhere = parts_of(original, "email/header.py")[0].block
    damage_block(folder, elsewhere)
    (folder / shard_name(5)).unlink()
    with Corpus(folder, check_shards=False) as corpus:
        assert elsewhere not in corpus.blocks_of(5)
        key = next(p.key for b in corpus.blocks_of(1) if b != elsewhere for p in corpus.read(b).slices if p.ends)
    assert take_out(folder, key) == parts_of(original, key)
    before = (folder / WITHDRAWN_FILE).read_bytes()
    with pytest.raises(
        CorpusError, match=r"no document 'email/header.py', unless(.|\n)*block .* is damaged"
    ) as refusal:
        take_out(folder, "email/header.py", "email/utils.py")
    assert shard_name(5) in str(refusal.value)
    assert (folder / WITHDRAWN_FILE).read_bytes() == before


@pytest.mark.parametrize("which", [0, 3, -1])
def test_document_is_withdrawn_completely_or_not_at_all(folder: Path, original: Corpus, which: int):
    damage_block(folder, parts_of(original, "long")[which].block)
    with pytest.raises(CorpusError, match=r"no document 'long', unless it is in a part that cannot be read"):
        take_out(folder, "long")
    assert not (folder / WITHDRAWN_FILE).exists()


@pytest.mark.slow
def test_the_command_takes_names_and_lists_of_names(tmp_path: Path, byteloom: Run):
    keys = ["plain", "line\x0bbreaks\x1cof Python's", "no UTF-8 \udcff", "listed", "another"]
    folder = tmp_path / "corpus"
    folder.mkdir()
    there = [Document(key, "text", lambda key=key: iter([b"of " + key.encode(errors="replace")])) for key in keys]
    shard = write_shard(folder, 0, pack_documents(there, 6_000, lambda document, error: None), level=3)
    assert shard is not None
    write_index(folder, [shard])
    usage = byteloom("withdraw", folder, check=False)
    assert usage.returncode == 2
    assert "--list" in usage.stderr
    names = tmp_path / "names"
    names.write_bytes(b"\n" + "\n  \n\n".join(keys[1:4]).encode("utf-8", "surrogateescape"))
    said = byteloom("withdraw", folder, "plain", "--list", names).stderr
    assert f"4 documents withdrawn; {folder}/withdrawn.json lists all" in said
    assert [entry.key for entry in listed(folder)] == keys[:4]
    assert faults(folder) == []
