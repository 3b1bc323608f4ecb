"""Staging: chunks of one size, which fragments fill one after another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint import staging
from pretrain.checkpoint.staging import CHUNK_BYTES, Staging, pieces_of, places_of
from pretrain.distributed.fragments import Fragment

CHUNK = 16


@given(st.lists(st.integers(0, 3 * CHUNK), max_size=6))
def test_pieces_fill_chunks_without_a_gap(lengths: list[int]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "CHUNK_BYTES", 4 * CHUNK)
        values = torch.arange(float(sum(lengths)))
        parts = values.split(lengths) if lengths else ()
        fragments = [Fragment(f"model/{i}", (len(part) + 5,), 5, part) for i, part in enumerate(parts)]
        chunks = Staging().chunks(len(values), pinned=False)
        pieces = pieces_of(fragments)
        for place, piece in zip(places_of(pieces, chunks), pieces, strict=True):
            assert len(place) == len(piece.data)
            place.copy_(piece.data)
            assert piece.start - 5 == piece.data[0] - fragments[int(piece.name.removeprefix("model/"))].data[0]
        assert all(len(chunk) == CHUNK for chunk in chunks[:-1])
        assert torch.equal(torch.cat([torch.empty(0), *chunks]), values)


def test_memory_is_reused_and_no_chunk_needs_more_than_a_power_of_two():
    memory = Staging()
    values = CHUNK_BYTES // 4 + 1000
    chunks = memory.chunks(values, pinned=False)
    assert [4 * len(chunk) for chunk in chunks] == [CHUNK_BYTES, 4000]
    assert CHUNK_BYTES.bit_count() == 1
    fewer = memory.chunks(values - 999, pinned=False)
    assert [chunk.data_ptr() for chunk in fewer] == [chunk.data_ptr() for chunk in chunks]
    assert [len(chunk) for chunk in fewer] == [CHUNK_BYTES // 4, 1]
    assert memory.chunks(0, pinned=False) == []
