"""Laws of the attention of Perceiver AR (arXiv:2202.07765 and its authors' code). Exact laws are tested in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.models.blocks.attention import attention
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.feed_forward import FeedForward
from pretrain.models.blocks.multi_head import Attention, CrossAttention
from pretrain.models.blocks.positions import Rotary, frequencies, rotate
from pretrain.models.blocks.transformer import TransformerBlock
from pretrain.models.families.perceiver_ar import KeptInputs, late, visible_kept
from tests.pretrain.models.perceivers import KINDS, ROWS, N, T, build, layers, log_probabilities, random_ids

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.slow
@kinds
def test_b1_a_latent_depends_on_its_own_input_and_every_earlier_one_and_on_nothing_later(kind: str):
    model = build(**KINDS[kind])
    ids = random_ids(1)
    base = log_probabilities(model, ids)[0]
    for u in range(T):  # byte u is input u + 1
        changed = ids.clone()
        changed[0, u] = (changed[0, u] + 1) % 256
        moved = (log_probabilities(model, changed)[0] - base).abs().amax(-1)
        later = torch.arange(T - N, T) > u
        assert (moved[~later] == 0).all(), f"byte {u} leaks"
        assert (moved[later] > 1e-12).all(), f"byte {u} is not seen everywhere after it"


def test_b2_the_6_latents_of_10_inputs_see_inputs_0_to_4_through_0_to_9():
    model = build(sequence_length=10, latents=6)
    places = model.place_latents(torch.tensor([10]), 10)
    visible = model.visible(places, torch.zeros(1, 10, 32)).booleans(6, 10)
    assert [row.nonzero().flatten().tolist() for row in visible[0, 0]] == [list(range(n + 1)) for n in range(4, 10)]


def test_b2_two_of_6_latents_are_not_scored_in_a_sequence_of_4():
    model = build(sequence_length=10, latents=6)
    ids = random_ids(length=10)
    ids[1, 4:] = PADDING
    nats = model(ids)
    torch.testing.assert_close(nats[1:, :4], model(ids[1:, :4]), atol=1e-6, rtol=0)
    torch.testing.assert_close(nats[:1], model(ids[:1]), atol=1e-6, rtol=0)
    assert model.place_latents(torch.tensor([4]), 10).tolist() == [list(range(6))]
    assert model.scored(4) == slice(0, 4)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_b3_model_with_a_latent_for_every_position_is_a_transformer_with_one_more_layer(positions: str):
    model = build(latents=T, cross_heads=4, positions=positions, rotary_fraction=1.0)
    cross = model.blocks[0]
    with torch.no_grad():
        model.to_latents.weight.copy_(torch.eye(32))
        for norm in (cross.attention_norm, cross.input_norm):
            norm.weight.copy_(torch.linspace(0.5, 2.0, 32))
    rotary = Rotary(longest_wavelength=T) if positions == "rotary" else None
    attention = Attention(32, 4, 0.0, rotary, bias=True)
    first = TransformerBlock(32, attention, FeedForward(32, "squared_relu", bias=True), 0.0).double()
    own = cross.state_dict()
    query_key_value = {
        f"attention.query_key_value.{what}": torch.cat(
            [own[f"attention.query.{what}"], own[f"attention.key_value.{what}"]]
        )
        for what in ("weight", "bias")
    }
    same = {name: value for name, value in own.items() if "query" not in name and "key" not in name}
    same.pop("input_norm.weight"), same.pop("input_norm.bias")
    first.load_state_dict(same | query_key_value)
    ids = random_ids()
    x = model.embed(late(ids), torch.arange(T))
    for block in (first, *model.blocks[1:]):
        x = block(x)
    expected = model.head(model.norm(x))[..., :VOCABULARY].log_softmax(-1)
    torch.testing.assert_close(log_probabilities(model, ids), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_b4_the_last_prediction_depends_on_the_number_of_latents_if_there_are_latent_layers(count: int):
    model = build(**layers(count))
    ids = random_ids()
    few, many = (log_probabilities(model, ids, latents)[:, -1] for latents in (N // 2, T))
    difference = (few - many).abs().max()
    assert difference < 1e-12 if count == 0 else difference > 1e-3


@pytest.mark.slow
@kinds
def test_b5_cached_decoding_equals_the_full_forward_with_as_many_latents_as_the_caches_hold(kind: str):
    model = build(**KINDS[kind], **({} if kind == "several cross-attends" else layers(3)))
    ids = random_ids()
    decoder = model.decoder(ROWS)
    held = []
    for t in range(T):
        logits = decoder.step(ids[:, t - 1]) if t else decoder.prime(ids[:, :0])
        assert decoder.length == t
        held.append(decoder.latents)
        expected = log_probabilities(model, ids[:, : t + 1], decoder.latents)[:, -1]
        torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-10, rtol=0)
    # They grow to N. Whenever they are full, N/2 of them are recomputed.
    assert held == [*range(1, N + 1), *[4, 5, 6, 7, 8] * 3, 4][:T]
    with pytest.raises(ValueError, match="context is full"):
        decoder.step(ids[:, T - 1])


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("prefix", [0, 1, N - 1, N, N + 1, T - 1])
def test_b5_primed_decoder_and_its_steps_while_latents_grow_equal_the_full_forward(kind: str, prefix: int):
    model = build(**KINDS[kind])
    ids = random_ids()
    decoder = model.decoder(ROWS)
    logits = decoder.prime(ids[:, :prefix])
    for t in range(prefix, max(N, prefix + 1)):
        expected = log_probabilities(model, ids[:, : t + 1])[:, -1]
        torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-10, rtol=0)
        if t + 1 < max(N, prefix + 1):
            logits = decoder.step(ids[:, t])
    with pytest.raises(ValueError, match="only a fresh decoder"):
        decoder.prime(ids[:, :0])


@pytest.mark.parametrize(("count", "exact"), [(1, True), (2, False), (3, False)])
def test_b5_sliding_caches_are_another_model_with_two_layers_or_more(count: int, exact: bool):
    """This is why the decoder recomputes its caches. A model with one layer cannot show it."""
    model = build(positions="learned", **layers(count))
    ids = random_ids()
    decoder = model.decoder(ROWS)
    decoder.prime(ids[:, : N - 1])
    for t in range(N - 1, T - 1):
        for cache in decoder._caches[1:]:
            cache.keep_last(cache.kept - 1)
        decoder.latents = N - 1
        logits = decoder.step(ids[:, t])
    difference = (logits.log_softmax(-1) - log_probabilities(model, ids)[:, -1]).abs().max()
    assert difference < 1e-10 if exact else difference > 1e-3


def test_b6_inputs_are_dropped_only_in_training():
    dropping, plain = build(cross_attend_dropout=0.9), build()
    ids = random_ids()
    assert torch.equal(dropping(ids), plain(ids))
    torch.manual_seed(0)
    assert not torch.equal(dropping.train()(ids), plain(ids))


def every_input(kept: Tensor) -> KeptInputs:
    """Return all inputs of (rows, T) booleans, those that are dropped too."""
    return KeptInputs(torch.arange(kept.shape[1]).expand(kept.shape), kept)


def test_b6_an_input_is_dropped_for_all_latents_of_its_row():
    model = build(cross_attend_dropout=0.4).train()
    places = model.place_latents(torch.full((500,), T), T)
    torch.manual_seed(0)
    kept = torch.rand(500, T) >= 0.4
    visible = visible_kept(places, every_input(kept), documents=None)
    assert visible.shape == (500, 1, N, T)
    assert kept[:, : T - N].any(1).all()  # otherwise a latent may lose all its inputs
    assert torch.equal(visible[:, 0], kept[:, None] & (torch.arange(T) <= places[..., None]))
    assert kept.double().mean().item() == pytest.approx(0.6, abs=0.02)


def test_b6_latent_that_loses_all_inputs_of_its_document_sees_them_all():
    kept = torch.tensor([[False, False, True, False, False, False, True, False]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    places = torch.arange(8)[None]
    seen = visible_kept(places, every_input(kept), None)[0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen] == [[0], [0, 1], *[[2]] * 4, *[[2, 6]] * 2]
    seen = visible_kept(places, every_input(kept), documents)[0, 0]
    expected = [[0], [0, 1], [2], [2], [4], [4, 5], [6], [6]]
    assert [row.nonzero().flatten().tolist() for row in seen] == expected


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.8, 0.97])
@pytest.mark.parametrize("crossing", [True, False])
@pytest.mark.parametrize("kind", ["rotary", "learned", "sinusoidal", "several cross-attends"])
def test_b6_dropped_inputs_are_left_out_before_their_keys_with_the_same_numbers(
    share: float, crossing: bool, kind: str
):
    long = {"sequence_length": 200, "latents": 8, "minimum_crop": 1}
    fields = KINDS[kind] | long | {"cross_attend_dropout": share, "attention_across_documents": crossing}
    model = build(**fields).train()
    ids = random_ids(rows=12, length=200)
    ids[torch.rand(12, 200, generator=torch.Generator().manual_seed(2)) < 0.05] = SEPARATOR
    torch.manual_seed(3)
    nats = model(ids)
    nats.sum().backward()
    torch.manual_seed(3)
    end = model.draw_crop(12, 200)[1]
    places = model.place_latents(end, 200)
    kept = torch.rand(12, 200) >= share
    masked = model.nats(model.read(ids, places, every_input(kept)), ids.gather(1, places))
    torch.testing.assert_close(nats.gather(1, places), masked, atol=1e-10, rtol=0)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(masked.sum(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("share", "crossing"), [(0.0, True), (0.5, True), (0.97, True), (0.97, False)])
def test_b6_keys_are_computed_for_the_inputs_that_flops_count(share: float, crossing: bool):
    """The counter of torch agrees in bf16, where short attention is two products."""
    fields = {"sequence_length": 250, "cross_attend_dropout": share, "attention_across_documents": crossing}
    model = build(double=False, **fields).bfloat16().train()
    ids = random_ids(rows=1, length=250)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert counter.get_total_flops() == model.flops(250)
    everything = model.eval().flops(250)
    assert model.train().flops(250) == everything if share == 0 else model.train().flops(250) < everything


def test_b6_pass_in_which_chance_keeps_more_inputs_than_there_is_room_for_reads_all():
    model = build(sequence_length=200, cross_attend_dropout=0.9).train()
    end = torch.full((2,), 200)
    room = model.read_inputs(200)
    assert room < 200
    assert model.draw_kept(end, 200).places.shape == (2, room)
    model.read_inputs = lambda length: 8
    assert model.draw_kept(end, 200).places.shape == (2, 200)


def test_b6_scores_are_causal_and_finite_when_nearly_every_input_is_dropped():
    model = build(cross_attend_dropout=0.999, cropping="none").train()
    ids = random_ids().clone()

    def nats() -> Tensor:
        torch.manual_seed(0)
        return model(ids)

    before = nats()
    before.sum().backward()
    assert torch.isfinite(before).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    ids[:, T - 2 :] = 7
    assert torch.equal(nats()[:, : T - 2], before[:, : T - 2])


def test_b7_scores_depend_only_on_differences_of_positions():
    torch.manual_seed(0)
    rotary = Rotary(fraction=0.5, longest_wavelength=1000)
    cross = CrossAttention(32, 32, 2, rotary).double()
    latents, inputs, shift = torch.randn(1, 4, 32).double(), torch.randn(1, 9, 32).double(), 100
    places = torch.arange(5, 9)
    visible = torch.arange(9) <= places[:, None]
    base = cross(latents, inputs, places, torch.arange(9), visible)
    cache = LayerCache()  # holds `shift` earlier inputs that no latent sees
    cross(latents, torch.randn(1, shift, 32).double(), places, torch.arange(shift), None, cache)
    hidden = F.pad(visible, (shift, 0), value=False)
    moved = cross(latents, inputs, places + shift, torch.arange(shift, shift + 9), hidden, cache)
    torch.testing.assert_close(moved, base, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("fraction", "turned"), [(0.25, 2), (0.5, 6), (0.7, 8), (1.0, 12)])
def test_b7_rotary_fraction_rotates_an_even_number_of_channels(fraction: float, turned: int):
    x = torch.randn(1, 2, 5, 12, dtype=torch.double)
    y = rotate(x, torch.arange(1, 6), Rotary(fraction, longest_wavelength=100))
    assert torch.equal(y[..., turned:], x[..., turned:])
    assert (y[..., :turned] != x[..., :turned]).all()


def test_b7_rotary_frequencies_equal_those_of_the_authors_code():
    """max_wavelength^((2/d) linspace(0, d/2, d/2)) and its inverse. The range includes both ends."""
    got = frequencies(8, 8192, torch.device("cpu"), torch.double)
    expected = 1 / 8192 ** ((2 / 16) * torch.linspace(0, 8, 8, dtype=torch.double))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.double, torch.float, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(6, 10), (6, 6), (1, 10), (30, 300)])
def test_b8_attention_equals_its_formula_with_the_mask_at_the_bottom_right(dtype: torch.dtype, queries: int, keys: int):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8).to(dtype) for length in (queries, keys, keys))
    visible = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    scores = torch.einsum("rhqd,rhkd->rhqk", q.double(), k.double()) / math.sqrt(8)
    expected = torch.einsum("rhqk,rhkd->rhqd", scores.masked_fill(~visible, -math.inf).softmax(-1), v.double())
    tolerance = {torch.double: 1e-12, torch.float: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(attention(q, k, v, visible).double(), expected, atol=tolerance, rtol=0)
    added = torch.where(visible, 0.0, -math.inf).to(dtype)
    torch.testing.assert_close(attention(q, k, v, added).double(), expected, atol=tolerance, rtol=0)
    top_left = F.scaled_dot_product_attention(q, k, v, is_causal=True).double()
    assert torch.allclose(top_left, expected, atol=tolerance) == (queries == keys)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_block_mask_of_a_crop_has_the_numbers_of_the_dense_one(positions: str, monkeypatch: pytest.MonkeyPatch):
    """A CPU has no backward pass of FlexAttention, so its mask becomes a dense one. Inputs cross blocks of 128."""

    def dense(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
        assert (block_mask.kv_num_blocks + block_mask.full_kv_num_blocks).min() < 5  # some after the crop are skipped
        visible = create_mask(block_mask.mask_mod, len(q), None, q.shape[2], k.shape[2], device="cpu")
        return F.scaled_dot_product_attention(q, k, v, visible)

    monkeypatch.setattr("pretrain.models.blocks.attention._compiled", lambda kernel: dense)
    model = build(sequence_length=520, latents=140, positions=positions, **layers(1)).train()
    ids, results = random_ids(length=520), []
    for in_blocks in (False, True):
        monkeypatch.setattr(model, "_takes_blocks", lambda inputs, count, takes=in_blocks: takes)
        torch.manual_seed(4)  # of the crops
        nats = model(ids)
        results.append([nats, *torch.autograd.grad(nats.sum(), list(model.parameters()))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)


def test_z_loss_changes_gradients_and_no_loss():
    losses, gradients = [], []
    for z_loss in (0.0, 0.1):
        model = build(z_loss=z_loss)
        nats = model(random_ids())
        nats.sum().backward()
        losses.append(nats.detach())
        gradients.append(model.head.bias.grad)
    assert torch.equal(*losses)
    assert not torch.allclose(*gradients)
