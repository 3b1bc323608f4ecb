"""Entropies beside a corpus: files, rows and damage. A function of the bytes stands for the model of bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from data_pipeline.corpus.blocks import Block
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.corpus.entropies import CARD, FOLDER, Entropies, EntropiesKey, StoredEntropies, write_entropies
from data_pipeline.corpus.storage.remote import RemoteConfig
from data_pipeline.corpus.verify import verify
from data_pipeline.errors import CorpusError, DamagedCorpusError
from data_pipeline.stream.config import DataConfig
from data_pipeline.stream.loader import Loader, LoaderConfig
from data_pipeline.stream.mixture import Mixture, Stage
from data_pipeline.stream.reading import open_streams
from tests.conftest import prepare_corpus
from tests.data_pipeline.corpora import damage_block
from tests.data_pipeline.corpus.faulty_server import FaultyServer

KEY = EntropiesKey("ab" * 32, False)
LENGTH = 700


def of_bytes(block: Block) -> Entropies:
    """Return a number for each byte, which tells the bytes apart."""
    return (np.frombuffer(block.content, np.uint8) / 64).astype(np.float16)


@pytest.fixture(scope="module")
def written(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a corpus of some shards with entropies."""
    folder = tmp_path_factory.mktemp("entropies") / "corpus"
    prepare_corpus(sources[:1], folder, include=["*.py"], block_bytes=5_000, shard_bytes=30_000)
    with Corpus(folder) as corpus:
        assert write_entropies(corpus, KEY, lambda: of_bytes, lambda done: None) == len(corpus.manifest["shards"]) > 1
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "corpus"))


def mixture_of(folder: Path, key: EntropiesKey | None, **packing: object) -> Mixture:
    """Return a mixture of the corpus with itself."""
    source = {"shards": str(folder), "weight": 1, **packing}
    config = DataConfig.model_validate({"mixture": {"one": source, "two": source}, "lanes": 3})
    return Mixture(open_streams(config, LENGTH, key), [Stage(0, {"one": 1.0, "two": 2.0})])


@pytest.mark.parametrize(
    "packing",
    [{}, {"separate_documents": False}, {"packing": "document", "documents": "split"}],
    ids=["separators", "no-separators", "document"],
)
def test_rows_have_the_entropies_of_their_bytes_and_no_other_change(written: Path, packing: dict[str, object]):
    own, plain = mixture_of(written, KEY, **packing), mixture_of(written, None, **packing)
    with (
        Loader(own, LoaderConfig(), global_batch=7, micro_batch=2, rank=1, world_size=2) as loader,
        Loader(plain, LoaderConfig(), global_batch=7, micro_batch=2, rank=1, world_size=2) as other,
    ):
        for _ in range(4):
            for found, expected in zip(next(loader).micro_batches, next(other).micro_batches, strict=True):
                assert np.array_equal(found.ids, expected.ids)
                assert expected.rows.entropies is None and found.rows.entropies is not None
                assert np.array_equal(found.rows.entropies, (found.rows.bytes / 64).astype(np.float16))
    for stream, without in zip(own.streams.values(), plain.streams.values(), strict=True):
        assert stream.fingerprint == without.fingerprint


def test_rows_of_a_hole_have_no_entropies(copied: Path):
    """The ranks that read a damaged block and those that do not have the same rows."""
    damage_block(copied, 3)
    stream = mixture_of(copied, KEY).streams["one"]
    stream.bad_blocks = None
    rows = stream.read(np.arange(stream.sequences_per_epoch))
    assert rows.padding is not None and rows.entropies is not None and rows.padding.any()
    assert np.array_equal(rows.entropies, (rows.bytes / 64).astype(np.float16))


def test_command_that_was_killed_continues_at_a_block(copied: Path):
    folder = copied / KEY.folder
    expected = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".f16", ".json")}
    shutil.rmtree(folder)

    class KilledError(Exception):
        """End of the process."""

    def until(count: int) -> Callable[[Block], Entropies]:
        def of_block(block: Block) -> Entropies:
            read.append(block)
            if len(read) > count:
                raise KilledError
            return of_bytes(block)

        return of_block

    with Corpus(copied) as corpus:
        read = list[Block]()
        with pytest.raises(KilledError):
            write_entropies(corpus, KEY, lambda: until(9), lambda done: None)
        with pytest.raises(CorpusError, match="has no entropies of the model abab"):
            StoredEntropies(corpus, KEY)
        (partial,) = folder.glob("*.f16.partial")
        partial.write_bytes(partial.read_bytes() + b"half a block")
        read, done = [], list[int]()
        write_entropies(corpus, KEY, lambda: until(10**9), done.append)
        assert len(corpus) - 9 <= len(read) <= len(corpus) - 9 + 2 and sum(done) == corpus.raw_bytes
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".f16", ".json")} == expected


def test_damage_is_found_by_verify_and_by_reading_and_mended_by_the_command(copied: Path):
    shard = sorted((copied / KEY.folder).glob("*.f16"))[1]
    content = bytearray(shard.read_bytes())
    content[11] ^= 1
    shard.write_bytes(content)
    calls = list[tuple[int, int]]()
    (fault,) = verify(copied, 2, lambda *call: calls.append(call))
    assert shard.name in fault and "byteloom entropies" in fault
    stored_bytes = sum(path.stat().st_size for path in copied.rglob("shard-*"))
    assert calls[-1] == (stored_bytes, stored_bytes)
    with Corpus(copied) as corpus:
        stored, block = StoredEntropies(corpus, KEY), corpus.blocks_of(1)[0]
        with pytest.raises(DamagedCorpusError, match="are not as they were written"):
            stored.read(block)
        assert np.array_equal(stored.read(block + 1), of_bytes(corpus.read(block + 1)))
        assert write_entropies(corpus, KEY, lambda: of_bytes, lambda done: None) == 1
    assert verify(copied, 1, lambda done, total: None) == []
    shard.write_bytes(shard.read_bytes()[:-1])
    with Corpus(copied) as corpus, pytest.raises(DamagedCorpusError, match="byteloom entropies"):
        StoredEntropies(corpus, KEY)


def test_entropies_of_others_are_refused(copied: Path, written: Path):
    with Corpus(copied) as corpus:
        for other in (KEY._replace(model="cd" * 32), KEY._replace(reset_at_newlines=True)):
            with pytest.raises(CorpusError, match="has no entropies of the model"):
                StoredEntropies(corpus, other)
        collision = KEY._replace(model=KEY.model[:-1] + "0")
        with pytest.raises(CorpusError, match="is of the model abab"):
            StoredEntropies(corpus, collision)
        card = copied / KEY.folder / CARD
        card.write_text(card.read_text().replace(corpus.content_sha256, "0" * 64))
        with pytest.raises(DamagedCorpusError, match="its digest is not that of its fields"):
            StoredEntropies(corpus, KEY)


def test_entropies_of_another_content_are_written_again(copied: Path, sources: list[Path]):
    """Also those of a command that was killed before the corpus was made again, though its blocks have equal sizes."""
    other = copied.parent / "other"
    for source in sources[0].rglob("*.py"):
        target = other / source.relative_to(sources[0])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes().swapcase())
    prepare_corpus([other], copied.parent / "new", include=["*.py"], block_bytes=5_000, shard_bytes=30_000)
    for path in copied.iterdir():
        if path.name != FOLDER:
            path.unlink()
            shutil.copy(copied.parent / "new" / path.name, path)
    for card in (copied / KEY.folder / CARD, None):
        with Corpus(copied) as corpus:
            with pytest.raises(DamagedCorpusError):
                StoredEntropies(corpus, KEY)
            if card is not None:
                card.unlink()
    with Corpus(copied) as corpus:
        assert write_entropies(corpus, KEY, lambda: of_bytes, lambda done: None) == len(corpus.manifest["shards"])
        stored = StoredEntropies(corpus, KEY)
        for block in range(len(corpus)):
            assert np.array_equal(stored.read(block), of_bytes(corpus.read(block)))


def test_entropies_are_refused_by_a_corpus_with_the_same_content_in_other_shards(copied: Path, written: Path):
    with Corpus(written) as corpus:
        manifest = corpus.manifest
    card = copied / KEY.folder / CARD
    tree = json.loads(card.read_text())
    del tree["blake3"], tree["shards"][1:]
    assert tree["content_sha256"] == manifest["content_sha256"] and len(manifest["shards"]) > 1
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    card.write_text(json.dumps({**tree, "blake3": blake3(text.encode()).hexdigest()}))
    with Corpus(copied) as corpus:
        with pytest.raises(DamagedCorpusError, match="is of another corpus"):
            StoredEntropies(corpus, KEY)
        assert write_entropies(corpus, KEY, lambda: of_bytes, lambda done: None) == 0
        assert np.array_equal(
            StoredEntropies(corpus, KEY).read(len(corpus) - 1), of_bytes(corpus.read(len(corpus) - 1))
        )


def test_entropies_at_a_url_are_fetched_ahead_and_kept_in_the_cache(written: Path, tmp_path: Path):
    remote = RemoteConfig(cache=str(tmp_path / "cache"), cache_reserve_bytes=0)
    with FaultyServer(written) as server, Corpus(written) as local:
        for requests in (2, 0):  # of a first epoch, and of another process: the entropies of a shard, and its seals
            asked: list[str] = []
            server.fault_of = lambda name, asked=asked: asked.append(name) if name.endswith(".f16") else None
            with Corpus(server.url, remote=remote) as corpus:
                stored = StoredEntropies(corpus, KEY)
                for block in corpus.blocks_of(1):
                    assert np.array_equal(stored.read(block, through=len(corpus)), of_bytes(local.read(block)))
            assert len(asked) == requests


@pytest.mark.parametrize("fault", ["flip", "short", "busy"])
def test_entropies_at_a_url_are_read_again_after_a_passing_fault(written: Path, fault: str):
    remote = RemoteConfig(attempts=4, backoff_seconds=0.001, timeout_seconds=20)
    with FaultyServer(written) as server, Corpus(written) as local, Corpus(server.url, remote=remote) as corpus:
        stored, answers = StoredEntropies(corpus, KEY), iter([fault])
        server.fault_of = lambda name: next(answers, None) if name.endswith(".f16") else None
        for block in range(3):
            assert np.array_equal(stored.read(block), of_bytes(local.read(block)))
        assert next(answers, None) is None
