"""Patches that follow the data, and SpaceByte over them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.models import build_model, small_config
from pretrain.models.families.spacebyte import SpaceByte, run_blocks
from pretrain.models.initial import Initial
from pretrain.models.patching.chunks import add_at, chunk_places, gather
from pretrain.models.patching.patcher import Patcher, PatchState
from pretrain.models.patching.rules import ByteClass, Fixed

ids_of_rows = st.lists(
    st.lists(st.sampled_from([*b"aZ09 .\n\x80\xbf\xc3\xe6\xff", SEPARATOR, PADDING]), min_size=9, max_size=9),
    min_size=1,
    max_size=3,
).map(torch.tensor)
patchers = st.one_of(st.builds(ByteClass, st.integers(1, 9)), st.builds(Fixed, st.integers(1, 9), st.integers(1, 5)))


def read_by(text: bytes) -> Tensor:
    """Return what the positions of a row read: the start, then its bytes."""
    return torch.tensor([[SEPARATOR, *text]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"a. The", [0, 2]),  # the full stop; the space after it is in the same run
        ("a日本".encode(), [0, 2, 5]),  # the first byte of each character
        (b" a", [0]),  # the start is spacelike
        (b"x2y3", [0]),
        (b"ab\ncd", [0, 3]),
    ],
)
def test_patches_start_at_the_first_spacelike_byte_of_a_run(text: bytes, expected: list[int]):
    patches = ByteClass(20)(read_by(text))
    assert patches.starts[0].nonzero()[:, 0].tolist() == expected
    assert patches.state.patches.tolist() == [len(expected)]


def test_class_of_every_byte():
    """Section 3 of arXiv:2404.14408: all but digits, letters and continuations of UTF-8."""
    words = {*b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", *range(0x80, 0xC0)}
    for byte in range(256):
        assert ByteClass(9)(read_by(bytes([ord("a"), byte]))).starts[0, 2] == (byte not in words), byte


@given(ids_of_rows, patchers, st.integers(1, 8), st.integers(0, 256))
def test_patches_of_a_prefix_are_those_of_the_row(ids: Tensor, patcher: Patcher, cut: int, other: int):
    read = torch.cat([torch.full_like(ids[:, :1], SEPARATOR), ids], 1)
    whole = patcher(read)
    starts, state = whole.starts, whole.state
    assert starts.sum(1).tolist() == state.patches.tolist()
    assert (starts.sum(1) <= patcher.capacity).all() and starts[:, 0].all()
    assert not starts[read == PADDING].any() and whole.wanted[read == SEPARATOR].all()
    assert torch.equal(starts, whole.wanted & (whole.wanted.cumsum(1) <= patcher.capacity))
    first = patcher(read[:, :cut])
    rest = patcher(read[:, cut:], first.state)  # a decoder's two calls
    assert torch.equal(torch.cat([first.starts, rest.starts], 1), starts)
    assert torch.equal(rest.state.patches, state.patches) and torch.equal(rest.state.last, state.last)
    changed = read.clone()
    changed[:, cut] = other
    assert torch.equal(patcher(changed).starts[:, :cut], starts[:, :cut])
    rows = torch.cat([patcher(row[None]).starts for row in read])
    assert torch.equal(rows, starts)


@given(ids_of_rows, patchers)
def test_vectors_of_patches_go_back_to_where_they_start(ids: Tensor, patcher: Patcher):
    starts = patcher(torch.cat([torch.full_like(ids[:, :1], SEPARATOR), ids], 1)).starts
    x = torch.randn(*starts.shape, 3, requires_grad=True)
    places, used = chunk_places(starts, patcher.capacity)
    assert used.sum(1).tolist() == starts.sum(1).tolist()
    values = gather(x, places)
    back = add_at(torch.zeros_like(x), places, used, values)
    assert torch.equal(back, torch.where(starts[..., None], x, 0))
    back.sum().backward()
    assert torch.equal(x.grad, starts[..., None].expand_as(x).to(x.dtype))


def spacebyte(**changes: Any) -> SpaceByte:
    torch.manual_seed(0)
    model = build_model(small_config("spacebyte", **changes))
    assert isinstance(model, SpaceByte)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.double().eval()


def test_values_and_rates_of_maps_follow_their_inputs_as_in_the_authors_code():
    """Linear of kjslag/spacebyte, transformer.py: deviation and rate have 1 / sqrt(inputs); tables are N(0, 1)."""
    model = build_model(small_config("spacebyte", parametrization="fan_in"))
    base = build_model(small_config("spacebyte"))
    tables = {"embedding.weight", "start", "positions", "patch_positions"}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert model.rate_multiplier(name) == 1 and model.initial(name) == base.initial(name)
            continue
        size = 1.0 if name in tables else parameter.shape[1] ** -0.5
        assert model.rate_multiplier(name) == size and model.initial(name) == Initial(size), name
        assert base.rate_multiplier(name) == 1 and base.initial(name) == Initial(0.02), name


@torch.no_grad()
def test_fixed_patches_are_strided():
    size = 4
    model = spacebyte(patcher={"name": "fixed", "size": size}, patches=8)
    ids = torch.randint(97, 123, (2, 32))
    x = run_blocks(model.first_blocks, model.embed(ids[:, :-1]))
    x[:, ::size] += model.patch_outputs(x[:, ::size], 0)
    expected = model.nats(model.norm(run_blocks(model.last_blocks, x)), ids)
    torch.testing.assert_close(model(ids), expected)


@torch.no_grad()
def test_rows_that_use_up_their_patches_are_scored_to_their_end():
    few, many = spacebyte(patches=3, positions="rotary"), spacebyte(patches=32, positions="rotary")
    many.load_state_dict(few.state_dict())
    ids = torch.tensor([list(b"a b c d e f g h i j k l m n o p "), list(b"aaaaaaaa bbbbbbbbbbb ccccccccccc")])
    ours, theirs = few(ids), many(ids)
    assert ours.isfinite().all()
    third = 4  # the third patch serves the bytes from here on, until the fourth starts
    torch.testing.assert_close(ours[0, : third + 2], theirs[0, : third + 2])
    assert not torch.allclose(ours[0, third + 2 :], theirs[0, third + 2 :])
    torch.testing.assert_close(ours[1], theirs[1])


@torch.no_grad()
def test_rows_of_a_decoder_have_patches_of_their_own():
    model = spacebyte()
    ids = torch.tensor([list(b"one two, three four five six sev"), list(b"onetwothreefourfivesixseveneight")])
    together = model.decoder(2)
    logits = [together.prime(ids[:, :5]), *(together.step(ids[:, place]) for place in range(5, 31))]
    for row in range(2):
        alone = model.decoder(1)
        own = [alone.prime(ids[row : row + 1, :5])]
        own += [alone.step(ids[row : row + 1, place]) for place in range(5, 31)]
        torch.testing.assert_close(torch.cat(own), torch.stack(logits)[:, row])
    assert PatchState.empty(1, torch.device("cpu")).last.tolist() == [SEPARATOR]
