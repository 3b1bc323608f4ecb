"""Laws of rows: their compact form and the reuse of their memory."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.stream.rows import DIGEST_MODULUS, REUSED_BYTES, Memory, Window, interleave
from data_pipeline.vocabulary import PADDING, SEPARATOR
from tests.pretrain.models.rows import rows_of


def random_ids(rows: int, length: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 256, (rows, length)).astype(np.int16)
    ids[draw.random(ids.shape) < 0.1] = SEPARATOR
    ids[draw.random(ids.shape) < draw.choice([0, 0.1])] = PADDING
    return ids


@pytest.mark.slow
@given(
    length=st.integers(1, 20),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    lanes=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_groups_have_the_ids_of_their_rows_for_any_layout_of_the_window(length, sizes, lanes, seed):
    ids = random_ids(sum(sizes), length, seed)
    order = np.argsort(np.arange(len(ids)) % lanes, kind="stable")  # lane after lane
    window = Window(len(ids), length, Memory())
    for slot, row in enumerate(order.tolist()):
        place = slot * length
        window.put(place, np.choose(np.maximum(ids[row] - 255, 0), [ids[row], 0, 7]).astype(np.uint8))
        window.separate(place + np.flatnonzero(ids[row] >= SEPARATOR))
        for column in np.flatnonzero(ids[row] == PADDING).tolist():
            window.pad(place + column, place + column + 1)
    for group, part in zip(
        window.in_groups(np.argsort(order), sizes), np.split(ids, np.cumsum(sizes)[:-1]), strict=True
    ):
        np.testing.assert_array_equal(group.ids, part)
        assert (group.padding is None) == (PADDING not in part)
        digests = [rows_of(row[None]).digest([g]) for g, row in enumerate(part)]
        assert group.digest(range(len(part))) == sum(digests) % DIGEST_MODULUS


@pytest.mark.slow
@given(rows=st.integers(1, 8), length=st.integers(1, 12), seed=st.integers(0, 1000), change=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_different_rows_or_places_have_different_digests(rows, length, seed, change):
    ids = random_ids(rows, length, seed)
    other = ids.copy()
    place = change % ids.size
    other.reshape(-1)[place] = (int(ids.reshape(-1)[place]) + 1 + change % 257) % 258
    assert rows_of(ids).digest(range(rows)) == rows_of(ids).digest(range(rows))
    assert rows_of(ids).digest(range(rows)) != rows_of(other).digest(range(rows))
    assert rows_of(ids).digest(range(rows)) != rows_of(ids).digest(range(1, rows + 1))


@given(rows=st.integers(1, 9), sources=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_rows_of_several_sources_are_joined_in_the_requested_order(rows, sources, seed):
    ids = random_ids(rows, 10, seed)
    of = np.random.default_rng(seed).integers(0, sources, rows)
    parts = [(own, rows_of(ids[own])) for source in range(sources) for own in [np.flatnonzero(of == source)]]
    np.testing.assert_array_equal(interleave(parts).ids, ids)


@pytest.mark.parametrize("size", [REUSED_BYTES, REUSED_BYTES - 1])
def test_memory_is_reused_only_when_nothing_refers_to_it(size: int):
    memory = Memory()
    whole = memory.take(size)
    held = torch.from_numpy(whole.reshape(1, -1)[:, 1::2])
    held[:] = 5
    del whole
    other = memory.take(size)
    other[:] = 6
    assert (held == 5).all()
    if size >= REUSED_BYTES:
        address = other.ctypes.data
        del other
        assert memory.take(size).ctypes.data == address
        assert len(memory.take(size + 1)) == size + 1
