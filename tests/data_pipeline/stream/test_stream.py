"""Laws of the stream: a pure function of the sequence number."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.errors import CorpusError
from data_pipeline.stream.byte_stream import ByteStream, PackingConfig
from data_pipeline.stream.loader import Loader, LoaderConfig
from data_pipeline.stream.order import permutation
from data_pipeline.vocabulary import PADDING, SEPARATOR
from tests.conftest import prepare_corpus


def stream_of(
    corpus: Corpus, sequence_length: int, *, lanes: int = 128, seed: int = 0, version: int = 3, **packing: object
) -> ByteStream:
    return ByteStream(
        corpus, PackingConfig(**packing), sequence_length, lanes=lanes, seed=seed, bad_blocks=0, version=version
    )


def batches(stream: ByteStream, world_size: int, global_batch: int, micro_batch: int, first: int, count: int):
    """Return `count` global batches, joined from the micro-batches of all ranks."""
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


@pytest.mark.slow
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


@pytest.mark.slow
@given(first_batch=st.integers(1, 8), second_batch=st.integers(1, 8), steps=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_a_change_of_batch_size_keeps_the_order(corpus, first_batch, second_batch, steps):
    stream = stream_of(corpus, 64, lanes=4)
    before = batches(stream, 1, first_batch, 2, 0, steps)
    after = batches(stream, 2, second_batch, 3, first_batch * steps, 2)
    flat = np.concatenate([*before, *after])
    np.testing.assert_array_equal(flat, [stream[g] for g in range(len(flat))])


@pytest.mark.slow
@given(
    sequence_length=st.integers(1, 700),
    lanes=st.integers(1, 40),
    separate=st.booleans(),
    epoch=st.integers(0, 3),
)
@settings(max_examples=15, deadline=None)
def test_each_byte_of_an_epoch_is_read_at_most_once_and_few_are_omitted(
    corpus, sequence_length, lanes, separate, epoch
):
    stream = stream_of(corpus, sequence_length, lanes=lanes, separate_documents=separate)
    lengths = corpus.lengths["raw_bytes"].astype(np.int64) + separate * corpus.lengths["document_ends"]
    seen = [np.zeros(length, np.int8) for length in lengths]
    first = epoch * stream.sequences_per_epoch
    for g in range(first, first + stream.sequences_per_epoch):
        pieces = stream.order.locate(g)
        assert sum(piece.length for piece in pieces) == sequence_length
        for piece in pieces:
            seen[piece.block][piece.start : piece.start + piece.length] += 1
    read = np.concatenate(seen)
    assert read.max() == 1
    assert len(read) - read.sum() < sequence_length


@pytest.mark.slow
def test_stream_without_separators_is_the_raw_bytes_and_with_them_documents_are_separated(corpus):
    plain = stream_of(corpus, 50, lanes=1, version=2, separate_documents=False)
    apart = stream_of(corpus, 50, lanes=1, version=2)
    raw = np.concatenate([plain[g] for g in range(plain.sequences_per_epoch)])
    ids = np.concatenate([apart[g] for g in range(apart.sequences_per_epoch)])
    assert raw.max() < SEPARATOR
    assert ids.max() == SEPARATOR
    expected = []
    for block in range(len(corpus)):  # one extent: documents in their order, starting at some place and wrapping around
        read = corpus.read(block)
        for part in read.slices:
            expected += [*read.content[part.start : part.start + part.length], *([SEPARATOR] * part.ends)]
    assert is_on_the_ring(ids, expected)
    assert is_on_the_ring(raw, [number for number in expected if number != SEPARATOR])


def is_on_the_ring(ids: np.ndarray, ring: list[int]) -> bool:
    """Return whether the ids are a range of the ring of documents, from any place on."""
    return ids.astype("<i2").tobytes() in np.array(ring + ring, "<i2").tobytes()


def test_row_j_of_the_next_batch_continues_row_j_when_lanes_equal_rows(corpus):
    stream = stream_of(corpus, 32, lanes=6)
    assert stream.order.lanes == 6
    for g in range(12):
        end, begin = stream.order.locate(g)[-1], stream.order.locate(g + 6)[0]
        same_block = (begin.block, begin.start) == (end.block, end.start + end.length)
        assert same_block or begin.start == 0


def test_a_corpus_smaller_than_the_lanes_has_fewer_lanes(tmp_path: Path):
    (tmp_path / "small").write_bytes(bytes(range(200)))
    stream = stream_of(prepare_corpus([tmp_path / "small"], tmp_path / "out"), 60, lanes=128)
    assert stream.order.lanes == stream.sequences_per_epoch == 3
    units = [min(int(stream[g][0]), 200) for g in range(6)]  # the separator is unit 200
    assert any(sorted((b - a) % 201 for b in units[:3]) == [0, 60, 120] for a in units[:3])
    assert units[:3] != units[3:]  # another epoch begins elsewhere


def test_a_corpus_shorter_than_a_sequence_is_refused(tmp_path: Path):
    (tmp_path / "small").write_bytes(b"hello")
    corpus = prepare_corpus([tmp_path / "small"], tmp_path / "out")
    with pytest.raises(CorpusError, match="less than one sequence of 60"):
        stream_of(corpus, 60)


@pytest.mark.slow
def test_epochs_have_different_orders_and_follow_each_other_without_a_gap(corpus, tmp_path: Path):
    stream = stream_of(corpus, 64, lanes=3)
    n = stream.sequences_per_epoch
    assert [stream.order.locate(g) for g in range(n)] == [stream.order.locate(g) for g in range(n)]
    got = batches(stream, 2, 5, 2, n - 7, 4)
    np.testing.assert_array_equal(np.concatenate(got), [stream[g] for g in range(n - 7, n + 13)])


@pytest.mark.slow
def test_extents_are_permuted_in_each_epoch(tmp_path: Path):
    (tmp_path / "big").write_bytes(np.random.default_rng(0).bytes(40 << 20))
    stream = stream_of(prepare_corpus([tmp_path / "big"], tmp_path / "out", level=1), 1 << 16, lanes=1, version=2)
    n = stream.sequences_per_epoch
    orders = [[stream.order.locate(epoch * n + k)[0].block for k in range(0, n, 16)] for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert sorted(set(orders[0])) == list(range(40))
    jumps = sum(b - a != 1 for a, b in zip(orders[0], orders[0][1:], strict=False))
    assert jumps <= 12  # ten extents of four blocks stay together, and the ring is opened in one of them


def test_the_permutation_is_pinned():
    """Golden values. They must not change, or every existing run would be reordered on resume."""
    assert permutation(16, seed=0, epoch=0).tolist() == GOLDEN[0]
    assert permutation(16, seed=0, epoch=1).tolist() == GOLDEN[1]
    assert permutation(16, seed=7, epoch=0).tolist() == GOLDEN[2]


@given(count=st.integers(0, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_permutation_is_a_bijection(count, seed, epoch):
    assert np.array_equal(np.sort(permutation(count, seed, epoch)), np.arange(count))


def test_the_fingerprint_covers_all_that_the_order_depends_on(corpus):
    variants = [{}, {"lanes": 9}, {"seed": 1}, {"separate_documents": False}, {"packing": "document"}]
    prints = {stream_of(corpus, 64, **options).fingerprint for options in variants}
    assert len(prints | {stream_of(corpus, 65).fingerprint}) == 6


@pytest.mark.slow
def test_stream_does_not_depend_on_the_place_and_compression_of_a_corpus(sources, tmp_path: Path):
    options = {"include": ["*.py"], "block_bytes": 10_000}
    a = prepare_corpus(sources, tmp_path / "a", level=1, **options)
    b = prepare_corpus(sources, tmp_path / "b", level=9, **options)
    ours, theirs = stream_of(a, 64, lanes=3), stream_of(b, 64, lanes=3)
    assert ours.fingerprint == theirs.fingerprint
    for g in range(0, ours.sequences_per_epoch, 7):
        np.testing.assert_array_equal(ours[g], theirs[g])


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [pytest.param(1, marks=pytest.mark.long), 4, 11])
def test_an_epoch_reads_each_block_about_once(corpus, lanes: int, monkeypatch: pytest.MonkeyPatch):
    """Each block is read once, and twice if two lanes share it. The corpus has far more blocks than are cached."""
    stream = stream_of(corpus, 50, lanes=lanes)
    assert len(corpus) > 3 * lanes
    reads = []
    read = Corpus.read_content
    monkeypatch.setattr(
        Corpus, "read_content", lambda self, block, through: reads.append(block) or read(self, block, through)
    )
    for g in range(stream.sequences_per_epoch):
        stream[g]
    assert len(reads) <= len(corpus) + lanes


@pytest.mark.slow
@given(first=st.integers(0, 3000), count=st.integers(1, 60), step=st.integers(1, 9), lanes=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_sequences_read_together_equal_sequences_read_alone(corpus, first, count, step, lanes):
    stream = stream_of(corpus, 300, lanes=lanes)
    sequences = np.random.default_rng(step).permutation(np.arange(first, first + count * step, step))
    np.testing.assert_array_equal(stream.read(sequences).ids, [stream[g] for g in sequences.tolist()])


class CountingCorpus:
    """A corpus without files, with blocks of random lengths. It counts its reads."""

    location = "nowhere"
    content_sha256 = "0"

    def __init__(self, blocks: int) -> None:
        self.lengths = np.zeros(blocks, [("raw_bytes", "<u4"), ("documents", "<u4"), ("document_ends", "<u4")])
        self.lengths["raw_bytes"] = np.random.default_rng(0).integers(700, 1300, blocks)
        self.raw_bytes = int(self.lengths["raw_bytes"].sum())
        self.reads = 0

    def read_content(self, block: int, through: int) -> tuple[bytes, np.ndarray]:
        self.reads += 1
        return bytes(int(self.lengths[block]["raw_bytes"])), np.empty(0, np.uint32)


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "ranks_a_lane"), [pytest.param(1024, 1, marks=pytest.mark.long), (256, 4)])
def test_each_of_1024_ranks_reads_only_the_blocks_of_its_rows(lanes: int, ranks_a_lane: int):
    """Each rank reads a block at most once, and only if it has a row in the block.

    With one lane for each rank, one rank reads a block, or two where two lanes meet. With fewer lanes, several ranks
    take turns in a lane.
    """
    world_size, length, batches = 1024, 64, 8
    corpus = CountingCorpus(batches * world_size * length // 1000)
    needed = 0
    for rank in range(world_size):
        stream = stream_of(corpus, length, lanes=lanes, separate_documents=False)
        mine = np.arange(rank, stream.sequences_per_epoch // world_size * world_size, world_size)
        for g in mine.tolist():
            stream[g]
        needed += len({piece.block for g in mine.tolist() for piece in stream.order.locate(g)})
    assert corpus.reads == needed <= ranks_a_lane * (len(corpus.lengths) + lanes + 1)


def test_each_document_becomes_one_row_that_is_cut_or_padded(corpus):
    length = 3000
    stream = stream_of(corpus, length, lanes=3, packing="document")
    contents: dict[str, bytes] = {}
    for number in range(len(corpus)):
        block = corpus.read(number)
        for part in block.slices:
            contents[part.key] = contents.get(part.key, b"") + block.content[part.start : part.start + part.length]
    assert max(map(len, contents.values())) > 2 * 10_000  # more than two blocks
    assert stream.sequences_per_epoch == len(contents)
    expected = {tuple([*content[:length], SEPARATOR, *[PADDING] * length][:length]) for content in contents.values()}
    rows = [tuple(stream[g].tolist()) for g in range(stream.sequences_per_epoch)]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= expected
    bare = stream_of(corpus, length, lanes=1, packing="document", separate_documents=False)
    assert not any(SEPARATOR in bare[g] for g in range(bare.sequences_per_epoch))
    again = stream.read(np.arange(stream.sequences_per_epoch))
    assert [tuple(row) for row in again.ids.tolist()] == rows


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["concatenate", "document"])
@pytest.mark.parametrize("documents", [3, 100, 200, 255])
def test_small_corpus_is_read_completely_after_some_epochs(tmp_path: Path, documents: int, packing: str):
    """The bytes that 128 lanes omit differ from epoch to epoch."""
    (tmp_path / "files").mkdir()
    for number in range(documents):
        (tmp_path / f"files/{number:03}").write_bytes(number.to_bytes(2, "big") * 8)
    stream = stream_of(prepare_corpus([tmp_path / "files"], tmp_path / "out"), 17, packing=packing)
    rows = stream.read(np.arange(16 * stream.sequences_per_epoch)).ids.ravel().astype(np.uint8).tobytes()
    assert all(number.to_bytes(2, "big") * 3 in rows for number in range(documents))


GOLDEN = [
    [4, 8, 0, 1, 7, 6, 11, 12, 2, 15, 10, 5, 3, 13, 14, 9],
    [12, 9, 14, 15, 7, 13, 0, 11, 1, 6, 10, 3, 4, 5, 2, 8],
    [8, 1, 12, 3, 2, 4, 10, 15, 7, 0, 14, 6, 11, 9, 13, 5],
]
