"""Laws of the stream: a pure function of the sequence number."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_pipeline.stream as stream_module
from data_pipeline.errors import CorpusError
from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.shards import Corpus
from data_pipeline.stream import ByteStream, StreamConfig, permutation
from data_pipeline.vocabulary import SEPARATOR
from tests.conftest import prepare_corpus


def stream_of(corpus: Corpus, sequence_length: int, **options: object) -> ByteStream:
    return ByteStream(corpus, StreamConfig(shards=str(corpus.folder), **options), sequence_length)


def batches(stream: ByteStream, world_size: int, global_batch: int, micro_batch: int, first: int, count: int):
    """`count` global batches put together from every rank's micro-batches."""
    loaders = [
        Loader(
            stream,
            LoaderConfig(threads=2, prefetch=2),
            global_batch=global_batch,
            micro_batch=micro_batch,
            first_sequence=first,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    result = []
    iterators = [iter(loader) for loader in loaders]
    for _ in range(count):
        parts = [next(iterator) for iterator in iterators]
        micro = sorted((m for part in parts for m in part.micro_batches), key=lambda m: m.index)
        assert [m.index for m in micro] == list(range(-(-global_batch // micro_batch)))
        assert len({part.next_sequence for part in parts}) == 1
        result.append(np.concatenate([m.ids for m in micro]))
    for loader in loaders:
        loader.close()
    return result


@given(
    world_size=st.integers(1, 7),
    global_batch=st.integers(1, 9),
    micro_batch=st.integers(1, 5),
    first=st.integers(0, 500),
)
@settings(max_examples=40, deadline=None)
def test_batches_are_the_same_for_every_world_size(corpus, world_size, global_batch, micro_batch, first):
    stream = stream_of(corpus, 96, lanes=5)
    expected = [
        np.stack([stream[first + step * global_batch + row] for row in range(global_batch)]) for step in range(3)
    ]
    for got, wanted in zip(batches(stream, world_size, global_batch, micro_batch, first, 3), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@given(first_batch=st.integers(1, 8), second_batch=st.integers(1, 8), steps=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_a_change_of_batch_size_keeps_the_order(corpus, first_batch, second_batch, steps):
    stream = stream_of(corpus, 64, lanes=4)
    before = batches(stream, 1, first_batch, 2, 0, steps)
    after = batches(stream, 2, second_batch, 3, first_batch * steps, 2)
    flat = np.concatenate([*before, *after])
    np.testing.assert_array_equal(flat, [stream[g] for g in range(len(flat))])


@given(
    sequence_length=st.integers(1, 700),
    lanes=st.integers(1, 40),
    separate=st.booleans(),
    epoch=st.integers(0, 3),
)
@settings(max_examples=15, deadline=None)
def test_each_byte_of_an_epoch_is_read_at_most_once_and_few_are_missed(corpus, sequence_length, lanes, separate, epoch):
    stream = stream_of(corpus, sequence_length, lanes=lanes, separate_documents=separate)
    lengths = corpus.index["raw_bytes"].astype(np.int64) + separate * corpus.index["document_ends"]
    seen = [np.zeros(length, np.int8) for length in lengths]
    first = epoch * stream.sequences_per_epoch
    for g in range(first, first + stream.sequences_per_epoch):
        pieces = stream.locate(g)
        assert sum(piece.length for piece in pieces) == sequence_length
        for piece in pieces:
            seen[piece.block][piece.start : piece.start + piece.length] += 1
    read = np.concatenate(seen)
    assert read.max() == 1
    assert len(read) - read.sum() < (stream.lanes + 1) * sequence_length


def test_without_separators_the_stream_is_the_raw_bytes_and_with_them_documents_are_apart(corpus):
    plain = stream_of(corpus, 50, lanes=1, separate_documents=False)
    apart = stream_of(corpus, 50, lanes=1)
    raw = np.concatenate([plain[g] for g in range(plain.sequences_per_epoch)])
    ids = np.concatenate([apart[g] for g in range(apart.sequences_per_epoch)])
    assert raw.max() < SEPARATOR
    assert ids.max() == SEPARATOR
    kept = ids[ids != SEPARATOR]
    shared = min(len(kept), len(raw))
    np.testing.assert_array_equal(kept[:shared], raw[:shared])
    expected = []
    for block in permuted_blocks(apart):
        read = corpus.read(block)
        for part in read.slices:
            expected += [*read.raw[part.start : part.start + part.length], *([SEPARATOR] * part.ends)]
    np.testing.assert_array_equal(ids, expected[: len(ids)])


def permuted_blocks(stream: ByteStream) -> list[int]:
    """Blocks in the order the first epoch of a stream of one lane reads them."""
    order: list[int] = []
    for g in range(stream.sequences_per_epoch):
        order += [piece.block for piece in stream.locate(g) if not order or piece.block != order[-1]]
    return list(dict.fromkeys(order))


def test_row_j_of_the_next_batch_continues_row_j_when_lanes_equal_rows(corpus):
    stream = stream_of(corpus, 32, lanes=6)
    for g in range(12):
        end, begin = stream.locate(g)[-1], stream.locate(g + 6)[0]
        same_block = (begin.block, begin.start) == (end.block, end.start + end.length)
        assert same_block or begin.start == 0


def test_a_corpus_smaller_than_the_lanes_has_fewer_lanes(tmp_path: Path):
    (tmp_path / "small").write_bytes(bytes(range(200)))
    stream = stream_of(prepare_corpus([tmp_path / "small"], tmp_path / "out"), 60, lanes=128)
    assert stream.lanes == stream.sequences_per_epoch == 3
    assert [stream[g][0] for g in range(6)] == [0, 60, 120, 0, 60, 120]


def test_a_corpus_shorter_than_a_sequence_is_refused(tmp_path: Path):
    (tmp_path / "small").write_bytes(b"hello")
    corpus = prepare_corpus([tmp_path / "small"], tmp_path / "out")
    with pytest.raises(CorpusError, match="less than one sequence of 60"):
        stream_of(corpus, 60)


def test_epochs_have_different_orders_and_meet_without_a_gap(corpus, tmp_path: Path):
    stream = stream_of(corpus, 64, lanes=3)
    n = stream.sequences_per_epoch
    assert [stream.locate(g) for g in range(n)] == [stream.locate(g) for g in range(n)]
    got = batches(stream, 2, 5, 2, n - 7, 4)
    np.testing.assert_array_equal(np.concatenate(got), [stream[g] for g in range(n - 7, n + 13)])


def test_extents_are_permuted_anew_in_each_epoch(tmp_path: Path):
    (tmp_path / "big").write_bytes(np.random.default_rng(0).bytes(40 << 20))
    stream = stream_of(prepare_corpus([tmp_path / "big"], tmp_path / "out", level=1), 1 << 16, lanes=1)
    n = stream.sequences_per_epoch
    orders = [[stream.locate(epoch * n + k)[0].block for k in range(0, n, 16)] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert sorted(set(orders[0])) == list(range(40))
    jumps = sum(b - a != 1 for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert jumps <= 10  # extents of four blocks stay together


def test_the_permutation_is_pinned():
    """Golden: if this changes, every run in the world is reordered on resume. It must not."""
    assert permutation(16, seed=0, epoch=0).tolist() == GOLDEN[0]
    assert permutation(16, seed=0, epoch=1).tolist() == GOLDEN[1]
    assert permutation(16, seed=7, epoch=0).tolist() == GOLDEN[2]


@given(count=st.integers(0, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_the_permutation_is_one(count, seed, epoch):
    assert np.array_equal(np.sort(permutation(count, seed, epoch)), np.arange(count))


@lru_cache
def fingerprints(folder: Path) -> list[str]:
    corpus = Corpus(folder)
    variants = [{}, {"lanes": 9}, {"seed": 1}, {"separate_documents": False}]
    return [stream_of(corpus, 64, **options).fingerprint for options in variants] + [stream_of(corpus, 65).fingerprint]


def test_the_fingerprint_tells_apart_all_that_the_order_depends_on(corpus):
    assert len(set(fingerprints(corpus.folder))) == 5


def test_where_a_corpus_lies_and_how_it_is_cut_and_compressed_change_nothing(sources, tmp_path: Path):
    options = {"include": ["*.py"], "block_bytes": 10_000}
    a = prepare_corpus(sources, tmp_path / "a", level=1, **options)
    b = prepare_corpus(sources, tmp_path / "b", level=9, shard_bytes=20_000, **options)
    assert len(a.manifest["shards"]) < len(b.manifest["shards"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_module, "EXTENT_BYTES", 30_000)
        ours, theirs = stream_of(a, 64, lanes=3), stream_of(b, 64, lanes=3)
        assert ours.fingerprint == theirs.fingerprint
        for g in range(0, ours.sequences_per_epoch, 7):
            np.testing.assert_array_equal(ours[g], theirs[g])


@pytest.mark.parametrize("lanes", [1, 4, 11])
def test_an_epoch_reads_each_block_about_once(corpus, lanes: int, monkeypatch: pytest.MonkeyPatch):
    """Once, and once more where two lanes share a block: far more blocks than are kept."""
    stream = stream_of(corpus, 50, lanes=lanes)
    assert len(corpus) > 3 * lanes
    reads = []
    read = Corpus.read
    monkeypatch.setattr(Corpus, "read", lambda self, block: reads.append(block) or read(self, block))
    for g in range(stream.sequences_per_epoch):
        stream[g]
    assert len(reads) <= len(corpus) + lanes


GOLDEN = [
    [4, 8, 0, 1, 7, 6, 11, 12, 2, 15, 10, 5, 3, 13, 14, 9],
    [12, 9, 14, 15, 7, 13, 0, 11, 1, 6, 10, 3, 4, 5, 2, 8],
    [8, 1, 12, 3, 2, 4, 10, 15, 7, 0, 14, 6, 11, 9, 13, 5],
]
