"""Perceiver AR's laws (arXiv:2202.07765 and its authors' code), in float64 where exactness is meant."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from byteloom.core.seeds import seed_of
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.vocabulary import PADDING, SEPARATOR, VOCABULARY
from pretrain.config.loading import load
from pretrain.engines import EngineConfig
from pretrain.engines.pytorch import PyTorchEngine
from pretrain.evaluation.evaluate import evaluate
from pretrain.evaluation.generation import Sampling, generate, row_generator, sample
from pretrain.evaluation.modes import stride_of
from pretrain.evaluation.windows import document_windows
from pretrain.models import build_model
from pretrain.models.blocks.attention import attention
from pretrain.models.blocks.cache import LayerCache
from pretrain.models.blocks.feed_forward import FeedForward
from pretrain.models.blocks.multi_head import Attention, CrossAttention
from pretrain.models.blocks.positions import Rotary, frequencies, rotate
from pretrain.models.blocks.transformer import TransformerBlock
from pretrain.models.families.perceiver_ar import START, PerceiverAR, PerceiverARConfig, image_axes, late
from pretrain.optim import OptimizerConfig
from tests.pretrain.models.rows import rows_of
from tests.test_project import ROOT

ROWS, T, N = 2, 24, 8
IMAGE = (2, 4, 3)


def build(double: bool = True, **changes: object) -> PerceiverAR:
    fields = {
        "sequence_length": T,
        "latents": N,
        "latent_model": {"width": 32, "layers": 2, "heads": 4},
        "cross_heads": 2,
        "dropout": 0.0,
        "zero_head": False,
    }
    torch.manual_seed(0)
    model = PerceiverAR(PerceiverARConfig.model_validate(fields | changes)).eval()
    return model.double() if double else model


def layers(count: int) -> dict[str, object]:
    return {"latent_model": {"width": 32, "layers": count, "heads": 4}}


def random_ids(rows: int = ROWS, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def log_probabilities(model: PerceiverAR, ids: Tensor, latents: int | None = None) -> Tensor:
    """(rows, N, VOCABULARY) of every id at the last N positions."""
    model.latents, own = latents or model.latents, model.latents
    rows, length = ids.shape
    logits = model.logits(model.read(ids, model.place_latents(torch.full((rows,), length), length)))
    model.latents = own
    return logits.log_softmax(-1)


KINDS = {
    "rotary": {"positions": "rotary"},
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal"},
    "image": {"positions": "image", "image": IMAGE},
    "several cross-attends": {"cross_attend_after": [0, 1]},
    "wide inputs": {"input_width": 48, "cross_heads": 6, "positions": "learned"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


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


def test_b2_of_10_inputs_6_latents_see_0_to_4_and_so_on_to_0_to_9():
    model = build(sequence_length=10, latents=6)
    places = model.place_latents(torch.tensor([10]), 10)
    visible = model.visible(places, torch.zeros(1, 10, 32)).booleans(6, 10)
    assert [row.nonzero().flatten().tolist() for row in visible[0, 0]] == [list(range(n + 1)) for n in range(4, 10)]


def test_b2_of_a_sequence_of_4_two_latents_of_6_are_not_scored():
    model = build(sequence_length=10, latents=6)
    ids = random_ids(length=10)
    ids[1, 4:] = PADDING
    nats = model(ids)
    torch.testing.assert_close(nats[1:, :4], model(ids[1:, :4]), atol=1e-6, rtol=0)
    torch.testing.assert_close(nats[:1], model(ids[:1]), atol=1e-6, rtol=0)
    assert model.place_latents(torch.tensor([4]), 10).tolist() == [list(range(6))]
    assert model.scored(4) == slice(0, 4)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_b3_with_a_latent_for_every_position_it_is_a_transformer_of_one_layer_more(positions: str):
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
    x = model.embed(late(ids), first_position=0)
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
    # They grow to N; then N/2 of them are filled anew, whenever they are full.
    assert held == [*range(1, N + 1), *[4, 5, 6, 7, 8] * 3, 4][:T]
    with pytest.raises(ValueError, match="context is full"):
        decoder.step(ids[:, T - 1])


@kinds
@pytest.mark.parametrize("prefix", [0, 1, N - 1, N, N + 1, T - 1])
def test_b5_a_primed_decoder_equals_the_full_forward_and_so_do_its_steps_while_latents_grow(kind: str, prefix: int):
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
def test_b5_caches_that_slide_instead_are_another_model_from_two_layers_on(count: int, exact: bool):
    """Why the decoder fills its caches anew. One layer cannot show it."""
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


def test_b6_dropped_inputs_are_dropped_in_training_only():
    dropping, plain = build(cross_attend_dropout=0.9), build()
    ids = random_ids()
    assert torch.equal(dropping(ids), plain(ids))
    torch.manual_seed(0)
    assert not torch.equal(dropping.train()(ids), plain(ids))


def test_b6_an_input_is_dropped_for_all_latents_and_heads_of_its_row():
    model = build(cross_attend_dropout=0.4).train()
    places = model.place_latents(torch.full((500,), T), T)
    torch.manual_seed(0)
    visible = model.visible(places, torch.zeros(500, T, 32))
    assert visible.shape == (500, 1, N, T)
    past = torch.arange(T) <= places[..., None]
    assert (visible[:, 0][~past] == -math.inf).all()
    dropped = visible[:, 0, -1] < 0  # the last latent's past is everything
    assert dropped.double().mean().item() == pytest.approx(0.4, abs=0.02)
    assert torch.equal((visible[:, 0] < 0) & past, dropped[:, None] & past)


def test_b6_nothing_leaks_and_all_stays_finite_when_nearly_every_input_is_dropped():
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


def test_b7_scores_depend_on_differences_of_positions_only():
    torch.manual_seed(0)
    rotary = Rotary(fraction=0.5, longest_wavelength=1000)
    cross = CrossAttention(32, 32, 2, rotary).double()
    latents, inputs, shift = torch.randn(1, 4, 32).double(), torch.randn(1, 9, 32).double(), 100
    places = torch.arange(5, 9)
    visible = torch.arange(9) <= places[:, None]
    base = cross(latents, inputs, places, visible)
    cache = LayerCache()  # of as many inputs before, which nobody sees
    cross(latents, torch.randn(1, shift, 32).double(), places, None, cache)
    moved = cross(latents, inputs, places + shift, F.pad(visible, (shift, 0), value=False), cache)
    torch.testing.assert_close(moved, base, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("fraction", "turned"), [(0.25, 2), (0.5, 6), (0.7, 8), (1.0, 12)])
def test_b7_a_fraction_of_the_channels_turns_an_even_number_of_them(fraction: float, turned: int):
    x = torch.randn(1, 2, 5, 12, dtype=torch.double)
    y = rotate(x, torch.arange(1, 6), Rotary(fraction, longest_wavelength=100))
    assert torch.equal(y[..., turned:], x[..., turned:])
    assert (y[..., :turned] != x[..., :turned]).all()


def test_b7_rotary_frequencies_are_those_of_the_authors_code():
    """max_wavelength^((2/d) linspace(0, d/2, d/2)) and its inverse: both ends are there."""
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


@pytest.mark.parametrize("length", [1, 5, N, N + 3, T])
def test_b9_outside_training_exactly_the_last_n_positions_are_scored(length: int):
    nats = build()(random_ids(length=length))
    assert nats.shape == (ROWS, length)
    assert (nats > 0).sum(1).tolist() == [min(N, length)] * ROWS
    assert (nats[:, build().scored(length)] > 0).all()


CROPS = {
    "none": {"cropping": "none"},
    "full_latents": {"cropping": "full_latents"},
    "minimum_crop": {"cropping": "full_latents", "minimum_crop": 2},
    "equal": {"cropping": "equal_position_likelihood"},
}
crops = pytest.mark.parametrize("policy", CROPS)


@crops
def test_b9_training_scores_what_it_drew_and_as_a_row_cut_there_would_be_scored(policy: str):
    model = build(**CROPS[policy]).train()
    ids = random_ids(rows=40)
    torch.manual_seed(5)
    scored = model.draw_scored(40, T)
    torch.manual_seed(5)
    nats = model(ids)
    model.eval()
    for row in range(40):
        places = scored[row].nonzero().flatten()
        assert places.tolist() == list(range(places[0], places[-1] + 1))
        end = int(places[-1]) + 1
        cut = model(ids[row : row + 1, :end])[0]
        torch.testing.assert_close(nats[row, :end][scored[row, :end]], cut[places], atol=1e-5, rtol=1e-5)


def ways_to_score(policy: str) -> list[int]:
    """How many of a policy's equally likely crops score each position."""
    windows = {
        "none": [(T - N, T)],
        "full_latents": [(first, first + N) for first in range(T - N + 1)],
        "minimum_crop": [(end - N, end) for end in range(2, T + 1)],
        "equal": [(first, first + N) for first in range(1 - N, T)],
    }[policy]
    return [sum(begin <= t < end for begin, end in windows) for t in range(T)]


@crops
def test_b9_how_often_each_position_is_trained(policy: str):
    rows = 20_000
    torch.manual_seed(0)
    scored = build(**CROPS[policy]).draw_scored(rows, T)
    ways = torch.tensor(ways_to_score(policy), dtype=torch.double)
    crops_there_are = {"none": 1, "full_latents": T - N + 1, "minimum_crop": T - 1, "equal": T + N - 1}[policy]
    torch.testing.assert_close(scored.double().mean(0), ways / crops_there_are, atol=0.015, rtol=0)
    if policy == "equal":
        assert set(ways.tolist()) == {N}
    if policy != "none":
        assert scored.any(0).all()
    if policy in ("none", "full_latents"):
        assert (scored.sum(1) == N).all()


def engine(**changes: object) -> PyTorchEngine:
    config = EngineConfig(precision="fp32", device="cpu")
    return PyTorchEngine(config, build(double=False, **changes), OptimizerConfig(), seed=3)


@crops
def test_training_counts_scored_targets_only_and_crops_by_seed_step_and_micro_batch(policy: str):
    ids = np.random.default_rng(0).integers(0, 256, (6, T)).astype(np.int16)
    targets = np.random.default_rng(1).random((6, T)) < 0.7
    batch = [MicroBatch(index, rows_of(ids[index * 3 :][:3]), targets[index * 3 :][:3]) for index in range(2)]
    results = [engine(**CROPS[policy]).train_step(batch, step=step, learning_rate=0.0) for step in (0, 0, 1)]
    torch.manual_seed(99)
    assert results[0] == results[1]
    assert (results[0] != results[2]) == (policy != "none")
    it = engine(**CROPS[policy])
    nats, count = 0.0, 0
    for index, micro_batch in enumerate(batch):
        seed = seed_of("micro-batch", 3, 0, index)
        torch.manual_seed(seed)
        scored = micro_batch.targets & it.model.draw_scored(3, T).numpy()
        torch.manual_seed(seed)
        got = it.model(torch.from_numpy(micro_batch.ids)).detach().double().numpy()
        nats, count = nats + got[scored].sum(), count + scored.sum()
    assert results[0].target_bytes == count
    assert results[0].nats == pytest.approx(nats, rel=1e-6)


def test_b10_the_papers_imagenet_model_has_770_094_339_parameters():
    """Vocabulary 259, 60 layers, 66 + 66 + 5 learned position rows; as the recipe has it."""
    with torch.device("meta"):
        model = build_model(load(ROOT / "configs/perceiver_ar/imagenet64.yaml").model)
    C = 1024
    block = 4 * (C * C + C) + (C * 4 * C + 4 * C) + (4 * C * C + C) + 2 * 2 * C
    cross = block + 2 * C
    rest = 259 * C + 137 * C + (C * C + C) + 2 * C + 259 * (C + 1)
    assert model.parameter_count() == 60 * block + cross + rest == 770_094_339


@pytest.mark.parametrize(
    ("recipe", "millions", "pieces"),
    [
        ("text-228m", 228.3, 259),  # 17 layers of 1,024
        ("mirrored-131072", 89.8, 259),  # 6 layers of 1,024, fixed sines
        ("pg19", 974.2, 32_003),  # 60 layers, inputs of 4,096; theirs has a vocabulary of pieces
    ],
)
def test_b10_parameters_of_other_models_of_the_paper(recipe: str, millions: float, pieces: int):
    with torch.device("meta"):
        config = load(ROOT / f"configs/perceiver_ar/{recipe}.yaml").model
        model = build_model(config)
    width, input_width = config.latent_model.width, config.input_width or config.latent_model.width
    more_pieces = (pieces - 259) * (input_width + width + 1)
    assert (model.parameter_count() + more_pieces) / 1e6 == pytest.approx(millions, abs=0.05)


def test_b10_with_a_head_of_zeros_the_first_loss_is_the_logarithm_of_the_vocabulary():
    nats = build(double=False, zero_head=True)(random_ids())[:, -N:]
    torch.testing.assert_close(nats, torch.full_like(nats, math.log(VOCABULARY)), atol=1e-6, rtol=0)


def test_e1_with_a_drawn_head_it_is_half_a_nat_more():
    """Logits are sums of D normed activations times weights of variance 1/D: of variance 1, so log V + 1/2."""
    model = build(double=False, latent_model={"width": 128, "layers": 2, "heads": 4})
    ids = torch.randint(0, 256, (256, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(ids)[:, -N:].mean().item() == pytest.approx(math.log(VOCABULARY) + 0.5, abs=0.06)


def test_flops_of_the_papers_imagenet_model():
    """L (24 C^2 + 4 C N) a latent, and the cross-attend: 20 C^2 + 4 C M a latent, K and V 4 C^2 an input."""
    with torch.device("meta"):
        model = build_model(load(ROOT / "configs/perceiver_ar/imagenet64.yaml").model)
    C, L, N, M = 1024, 60, 1024, 12288
    latent = L * (24 * C**2 + 4 * C * N) + 20 * C**2 + 4 * C * M + 2 * C**2 + 2 * C * VOCABULARY
    assert model.flops(M) == N * latent + M * 4 * C**2


def test_b11_one_layer_learns_to_copy_what_it_read_backwards():
    """Of 15 random bytes and their mirror image, the second half can be foretold."""
    torch.manual_seed(0)
    model = build(
        double=False,
        sequence_length=32,
        latents=16,
        latent_model={"width": 128, "layers": 1, "heads": 4},
        cross_heads=4,
        positions="learned",
        cropping="none",
        zero_head=True,
    ).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for _ in range(2000):
        first = torch.randint(0, 256, (64, 16), generator=generator)
        ids = torch.cat([first, first.flip(1)], 1)
        loss = model(ids)[:, 16:].mean()
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    first = torch.randint(0, 256, (256, 16), generator=generator)
    ids = torch.cat([first, first.flip(1)], 1)
    guesses = model.logits(model.read(ids, model.place_latents(torch.full((256,), 32), 32))).argmax(-1)
    assert (guesses == ids[:, 16:]).double().mean() > 0.99


def test_positions_of_an_image_are_column_row_and_channel_of_each_byte():
    """As in the authors' data: START at row 1 of each table, a byte at c at row c + 2."""
    height, width, channels = IMAGE
    x, y, c = image_axes(torch.arange(T), IMAGE)
    assert (x[0], y[0], c[0]) == (1, 1, 1)
    pixels = [(column, row, channel) for row in range(height) for column in range(width) for channel in range(channels)]
    got = [tuple(int(axis[n + 1]) - 2 for axis in (x, y, c)) for n in range(T - 1)]
    assert got == pixels[:-1]
    assert [table.shape[0] for table in build(**KINDS["image"]).position_tables] == [
        width + 2,
        height + 2,
        channels + 2,
    ]


@pytest.mark.parametrize("value", [0, 255, SEPARATOR])
def test_e2_every_byte_value_costs_something(value: int):
    nats = build()(torch.full((1, T), value))[:, -N:]
    assert torch.isfinite(nats).all()
    assert (nats > 0).all()


@pytest.mark.parametrize(("stride", "rows"), [(N, 1), (N, 3), (N, 64), (N // 2, 16), (3, 5)])
def test_e3_every_byte_of_every_document_is_scored_once_with_its_full_context(mixed: Corpus, stride: int, rows: int):
    model = build(double=False)
    assert stride_of(model) == N
    documents: dict[str, bytes] = {}
    for window in document_windows(mixed, 1):
        documents[window.key] = documents.get(window.key, b"") + bytes(window.ids.astype(np.uint8))
    with torch.no_grad():
        result = evaluate(lambda ids: model(torch.from_numpy(ids)), mixed, T, rows, lambda key: key, stride=stride)
        for key, document in documents.items():
            expected = 0.0
            for first in range(0, len(document), stride):
                window = document[max(0, first + stride - T) : first + stride]
                new = len(document[first : first + stride])
                expected += model(torch.tensor([list(window)]))[0, -new:].double().sum().item()
            assert result.groups[key].bytes == len(document)
            assert result.groups[key].nats == pytest.approx(expected, rel=1e-5)
            assert result.groups[key].documents == 1
    assert result.total.bytes == mixed.raw_bytes


def test_the_number_of_latents_is_free_when_the_model_is_used(mixed: Corpus):
    model = build(double=False)
    for latents in (1, 3, T):
        model.latents = latents
        assert stride_of(model) == latents
        with torch.no_grad():
            result = evaluate(lambda ids: model(torch.from_numpy(ids)), mixed, T, 64, stride=stride_of(model))
        assert result.total.bytes == mixed.raw_bytes
        assert len(bytes(generate(model, b"abc", T, Sampling(top_k=5)))) <= T


def test_e5_the_same_seed_draws_the_same_bytes_with_and_without_cache():
    model = build()
    model.latents = T
    with torch.no_grad():
        model.head.bias[SEPARATOR] = -100.0
    prompt, count = list(b"ab"), T - 3
    generators, expected = [row_generator(4, 0)], prompt.copy()
    for _ in range(count):
        logits = log_probabilities(model, torch.tensor([[*expected, 0]]))[:, -1]
        expected += sample(logits, Sampling(seed=4), generators)
    assert list(generate(model, bytes(prompt), count, Sampling(seed=4))) == expected[2:]
    assert list(generate(model, bytes(prompt), count, Sampling(seed=5))) != expected[2:]


@pytest.mark.parametrize("prompt", [b"", b"abcd", bytes(range(60))])
def test_e5_it_goes_on_past_latents_and_context(prompt: bytes):
    model = build(double=False)
    with torch.no_grad():
        model.head.bias[SEPARATOR] = -100.0
    assert len(list(generate(model, prompt, 4 * T, Sampling()))) == 4 * T


def test_start_is_never_foretold():
    logits = build().decoder(ROWS).prime(random_ids()[:, :3])
    assert logits.shape == (ROWS, VOCABULARY)
    assert START == VOCABULARY


@pytest.mark.parametrize(("what", "bound"), [("random", 0.05), ("constant", 0.01)])
def test_e6_it_learns_one_batch_by_heart(what: str, bound: float):
    model = build(double=False).train()
    ids = random_ids(1) if what == "random" else torch.full((1, T), 7)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    recent = []
    for step in range(1500):
        torch.manual_seed(step)
        scored = model.draw_scored(1, T)
        torch.manual_seed(step)
        bits = model(ids)[scored].mean() / math.log(2)
        recent = [*recent[-19:], bits.item()]
        if len(recent) == 20 and max(recent) < bound:
            return
        optimizer.zero_grad()
        bits.backward()
        optimizer.step()
    raise AssertionError(f"{max(recent):.3f} bits a byte after 1500 steps")


def test_initial_weights_have_the_variance_of_the_authors_code():
    model = build(double=False, latent_model={"width": 256, "layers": 1, "heads": 4})
    weight = model.blocks[1].feed_forward.contract.weight
    assert weight.std().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert weight.abs().max().item() <= 2 * 1024**-0.5 / 0.8796
    assert model.embedding.weight.std().item() == pytest.approx(0.8796, rel=0.02)
    assert not model.blocks[1].feed_forward.contract.bias.any()


def test_the_feed_forward_layer_squares_what_the_relu_lets_through():
    layer = build().blocks[1].feed_forward
    x = torch.randn(3, 32, dtype=torch.double)
    hidden = (x @ layer.expand.weight.T + layer.expand.bias).clamp(min=0) ** 2
    torch.testing.assert_close(layer(x), hidden @ layer.contract.weight.T + layer.contract.bias)


def test_only_residuals_are_dropped_not_attention_weights():
    model = build(dropout=0.5)
    assert Counter(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)) == {0.5: 3}
    assert all(block.attention.dropout == 0.0 for block in model.blocks[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_heads": 5}, "does not divide the inputs' width"),
        ({"rotary_fraction": 0.2}, "turns no pair of a head's 8"),
        ({"latents": T + 1}, "more than sequence_length"),
        ({"cross_attend_after": [2]}, "not among 2 layers"),
        ({"cross_attend_after": [1, 0]}, "does not rise"),
        ({"positions": "image"}, "go together"),
        ({"image": IMAGE}, "go together"),
        ({"positions": "image", "image": (2, 2, 3)}, "has 12 bytes, not 24"),
        ({"minimum_crop": T + 1}, "minimum_crop"),
        ({"minimum_crop": 3, "cropping": "none"}, "for cropping: full_latents"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_row_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="longer than the model's"):
        build()(random_ids(length=T + 1))
