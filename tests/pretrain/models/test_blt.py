"""Byte Latent Transformer: n-grams, attention between positions and patches, and the order of computation."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.models import build_model, small_config
from pretrain.models.blocks.hash_ngrams import PRIMES, HashNgrams, NgramConfig
from pretrain.models.families.blt import BLT
from pretrain.models.patching.cross_attention import PatchAttention, ReadingBlock, SlotBlock, gathered, pool, spread


def blt(**changes: Any) -> BLT:
    torch.manual_seed(0)
    model = build_model(small_config("blt", **changes))
    assert isinstance(model, BLT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model.double().eval()


@given(st.lists(st.sampled_from([*range(256), SEPARATOR, PADDING]), min_size=1, max_size=12))
def test_hash_of_an_ngram_is_a_polynomial_modulo_two_to_the_64(ids: list[int]):
    config = NgramConfig(sizes=(1, 3, 8), buckets=500_002, functions=2)
    found = HashNgrams(config, 1, across_documents=True).hashes(torch.tensor([ids]))
    symbols = [0] * 7 + [id + 4 if id < 256 else id - 255 for id in ids]
    for buckets, (prime, size) in zip(found, [(p, n) for p in PRIMES[:2] for n in config.sizes], strict=True):
        for place in range(len(ids)):
            tokens = symbols[place + 8 - size : place + 8]
            value = sum(token * prime**power for power, token in enumerate(tokens)) % 2**64
            value -= 2**64 * (value >= 2**63)  # signed, so that some sums are negative
            assert buckets[0, place] == value % config.buckets


@pytest.mark.parametrize("size", [0, -3])
def test_ngrams_have_a_byte_at_least(size: int):
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        NgramConfig(sizes=(3, size))


def test_ngrams_stop_at_the_start_of_a_document():
    ids = torch.tensor([[*b"abc", SEPARATOR, *b"de"]])
    other = torch.tensor([[*b"xyz", SEPARATOR, *b"de"]])
    within, across = (
        HashNgrams(NgramConfig(sizes=(4,), buckets=10**6), 1, across_documents=each).hashes for each in (False, True)
    )
    assert torch.equal(within(ids)[0][:, 3:], within(other)[0][:, 3:])
    assert not torch.equal(across(ids)[0][:, 3:], across(other)[0][:, 3:])


PATCH = torch.tensor([[0, 1, 1, 1, 3, 2], [0, 0, 0, 1, 1, 3]])
"""Patches of six positions of two rows, out of three; 3: none. Patch 2 of the second row has no position."""


def test_slots_attend_to_the_positions_of_their_patch():
    """The same as masked attention over all positions; a patch without positions keeps its slots."""
    torch.manual_seed(0)
    block = SlotBlock(8, 2, 1, 0.0).double()
    slots, x = torch.randn(2, 3, 2, 8).double(), torch.randn(2, 6, 8).double()
    layer = block.attention
    q = layer.queries(slots).flatten(1, 2).transpose(1, 2)
    k, v = (part.transpose(1, 2) for part in layer.keys_values(x).unbind(2))
    member = torch.arange(3)[:, None] == PATCH[:, None]
    mask = member.repeat_interleave(2, 1)[:, None]
    mixed = (q @ k.transpose(2, 3) / 2).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num() @ v
    expected = slots + layer.output(mixed.transpose(1, 2).flatten(2)).view(2, 3, 2, 8)
    torch.testing.assert_close(block(slots, x, PATCH), expected)
    torch.testing.assert_close(block(slots, x, PATCH)[1, 2], slots[1, 2])


def test_positions_attend_to_the_slots_of_their_patch():
    torch.manual_seed(0)
    reading = PatchAttention(8, 2, 2, 0.0).double()
    slots, x, patch = torch.randn(2, 3, 2, 8).double(), torch.randn(2, 6, 8).double(), PATCH.clamp(max=2)

    class Nothing(torch.nn.Module):
        def forward(self, x: Tensor, *_: Any) -> Tensor:
            return torch.zeros_like(x)

    block = ReadingBlock(8, Nothing(), Nothing(), 0.0, reading).double()  # type: ignore[arg-type]
    k, v = reading.keys_values(slots).unbind(3)
    for row in range(2):
        for place in range(6):
            own = patch[row, place]
            weights = (reading.queries(x[row, place]) * k[row, own]).sum(-1).div(2).softmax(0)
            mixed = (weights[..., None] * v[row, own]).sum(0)
            expected = 2 * x[row, place] + reading.output(mixed.flatten())  # the residual of the released code
            torch.testing.assert_close(block(x, None, None, slots, patch)[row, place], expected)


@pytest.mark.parametrize(("how", "expected"), [("max", 7.0), ("min", 2.0), ("mean", 4.0)])
def test_pooling_is_over_the_positions_of_a_patch(how: Any, expected: float):
    x = torch.tensor([[5.0, 2, 7, 3, 9, 1]])[..., None]
    pooled = pool(x, PATCH[:1], 4, how)
    assert pooled[0, :, 0].tolist() == [5.0, expected, 1.0, 9.0]
    assert pool(x, PATCH[1:], 3, how)[0, 2, 0] == 0


@torch.no_grad()
def test_slots_without_pooling_are_learned_and_read_their_patch():
    model = blt(pooling="none")
    states, starts = torch.randn(2, 32, 16).double(), torch.zeros(2, 32, dtype=torch.bool)
    starts[:, ::4] = True
    members = model.members(starts, 8, None)
    found = model.patch_inputs([states], members)
    shared = model.shared_slots.expand(2, 8, -1, -1)
    expected = model.patch_input(model.slot_blocks[0](shared, states, members.own).flatten(2))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found[:, 1], found[:, 2])
    with pytest.raises(ValueError, match="pooling none needs encoder_attention"):
        blt(pooling="none", encoder_attention="none")


def test_gradients_of_patches_are_summed_in_fp32():
    slots = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    spread(slots, torch.zeros(1, 1000, dtype=torch.long)).sum().backward()
    assert slots.grad is not None and slots.grad.item() == 1000
    assert gathered(torch.ones(1, 6, 1), PATCH[:1], 4)[0, :, 0].tolist() == [1, 3, 1, 1]


@torch.no_grad()
def test_fixed_patches_have_the_flow_of_megabyte():
    """With pooled vectors as patches, global vector k has inputs up to k P, and serves positions from k P on."""
    size = 4
    model = blt(
        patcher={"name": "fixed", "size": size},
        patches=8,
        encoder_attention="none",
        decoder_attention="none",
        attention_across_documents=True,
    )
    ids = torch.randint(97, 123, (2, 32))
    read = torch.cat([torch.full_like(ids[:, :1], SEPARATOR), ids[:, :-1]], 1)
    x = model.encode(model.embed(read, read), None, None)[0]
    shifted = torch.cat([x[:, :1].expand(-1, size - 1, -1), x[:, : 1 - size]], 1)  # a patch ends at k P
    pooled = shifted.unflatten(1, (-1, size)).amax(2)
    y = model.patch_outputs(model.patch_input(pooled), None)[:, :, 0]
    x = model.decode(x + y.repeat_interleave(size, 1), y[:, :1, None] * 0, torch.zeros_like(ids), None, None)
    torch.testing.assert_close(model(ids), model.nats(model.norm(x), ids))


@torch.no_grad()
def test_rows_that_use_up_their_patches_are_scored_to_their_end():
    few, many = blt(patches=3, attention_across_documents=True), blt(attention_across_documents=True)
    ids = torch.tensor([list(b"a b c d e f g h i j k l m n o p "), list(b"aaaaaaaa bbbbbbbbbbb ccccccccccc")])
    ours, theirs = few(ids), many(ids)
    assert ours.isfinite().all()
    fourth = 6  # position at which a fourth patch would start
    torch.testing.assert_close(ours[0, :fourth], theirs[0, :fourth])
    assert (ours[0, fourth:] != theirs[0, fourth:]).all()
    torch.testing.assert_close(ours[1], theirs[1])
    decoder = few.decoder(2)
    logits = torch.stack([decoder.prime(ids[:, :0]), *(decoder.step(ids[:, place]) for place in range(31))], 1)
    torch.testing.assert_close(-logits.log_softmax(-1).gather(2, ids[..., None])[..., 0].float(), ours)


def test_patches_without_positions_have_no_gradient_and_no_nan():
    model = blt().float()
    states = torch.randn(1, 32, 16, requires_grad=True)
    starts = torch.zeros(1, 32, dtype=torch.bool)
    starts[0, [0, 5]] = True
    inputs = model.patch_inputs([states], model.members(starts, 9, None))
    assert inputs.shape == (1, 9, 24) and inputs.isfinite().all()
    inputs[:, 3:].sum().backward()
    assert states.grad is not None and not states.grad.any()
    padding = torch.full((2, 32), PADDING)
    assert model(padding).isfinite().all()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("attention_across_documents", [False, True])
def test_rows_of_a_decoder_have_patches_of_their_own(attention_across_documents: bool):
    model = blt(attention_across_documents=attention_across_documents, encoder_attention="all")
    ids = torch.tensor([list(b"one two, three four five six sev"), list(b"onetwothreefourfivesixseveneight")])
    ids[1, 13] = SEPARATOR
    together = model.decoder(2)
    logits = [together.prime(ids[:, :5]), *(together.step(ids[:, place]) for place in range(5, 31))]
    for row in range(2):
        alone = model.decoder(1)
        own = [alone.prime(ids[row : row + 1, :5])]
        own += [alone.step(ids[row : row + 1, place]) for place in range(5, 31)]
        torch.testing.assert_close(torch.cat(own), torch.stack(logits)[:, row])
