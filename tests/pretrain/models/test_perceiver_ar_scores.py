"""Laws of Perceiver AR in use (arXiv:2202.07765): crops, scores, sizes, training and generation."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from byteloom.core.seeds import seed_of
from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.vocabulary import SEPARATOR, VOCABULARY
from pretrain.config.loading import load
from pretrain.engines import EngineConfig
from pretrain.engines.pytorch import PyTorchEngine
from pretrain.evaluation.evaluate import evaluate
from pretrain.evaluation.generation import Sampling, row_generator, sample
from pretrain.evaluation.modes import stride_of
from pretrain.evaluation.windows import document_windows
from pretrain.models import build_model
from pretrain.models.families.perceiver_ar import START, image_axes
from pretrain.optim import OptimizerConfig
from tests.pretrain.evaluation.test_evaluate_generate import generated
from tests.pretrain.models.perceivers import IMAGE, KINDS, ROWS, N, T, build, log_probabilities, random_ids
from tests.pretrain.models.rows import rows_of
from tests.test_project import ROOT


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


@pytest.mark.slow
@crops
def test_b9_training_scores_the_drawn_positions_and_equals_the_score_of_a_cropped_row(policy: str):
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
    """Return how many of a policy's equally likely crops score each position."""
    windows = {
        "none": [(T - N, T)],
        "full_latents": [(first, first + N) for first in range(T - N + 1)],
        "minimum_crop": [(end - N, end) for end in range(2, T + 1)],
        "equal": [(first, first + N) for first in range(1 - N, T)],
    }[policy]
    return [sum(begin <= t < end for begin, end in windows) for t in range(T)]


@crops
def test_b9_each_position_is_trained_as_often_as_the_crops_say(policy: str):
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


@pytest.mark.slow
@crops
def test_training_counts_only_scored_targets_and_crops_by_seed_step_and_micro_batch(policy: str):
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
    """The recipe has a vocabulary of 259, 60 layers, and 66 + 66 + 5 learned position rows."""
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
        ("pg19", 974.2, 32_003),  # 60 layers, inputs of 4,096; the paper's model has a vocabulary of pieces
    ],
)
def test_b10_parameters_of_other_models_of_the_paper(recipe: str, millions: float, pieces: int):
    with torch.device("meta"):
        config = load(ROOT / f"configs/perceiver_ar/{recipe}.yaml").model
        model = build_model(config)
    width, input_width = config.latent_model.width, config.input_width or config.latent_model.width
    more_pieces = (pieces - 259) * (input_width + width + 1)
    assert (model.parameter_count() + more_pieces) / 1e6 == pytest.approx(millions, abs=0.05)


def test_b10_first_loss_with_a_zero_head_is_the_logarithm_of_the_vocabulary():
    nats = build(double=False, zero_head=True)(random_ids())[:, -N:]
    torch.testing.assert_close(nats, torch.full_like(nats, math.log(VOCABULARY)), atol=1e-6, rtol=0)


def test_e1_first_loss_with_a_random_head_is_half_a_nat_higher():
    """Logits are sums of D normed activations times weights of variance 1/D: of variance 1, so log V + 1/2."""
    model = build(double=False, latent_model={"width": 128, "layers": 2, "heads": 4})
    ids = torch.randint(0, 256, (256, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(ids)[:, -N:].mean().item() == pytest.approx(math.log(VOCABULARY) + 0.5, abs=0.06)


def test_flops_of_the_papers_imagenet_model():
    """L (24 C^2 + 4 C N) per latent; the cross-attend: 20 C^2 + 4 C M per latent, and 4 C^2 (K, V) per input."""
    with torch.device("meta"):
        model = build_model(load(ROOT / "configs/perceiver_ar/imagenet64.yaml").model)
    C, L, N, M = 1024, 60, 1024, 12288
    latent = L * (24 * C**2 + 4 * C * N) + 20 * C**2 + 4 * C * M + 2 * C**2 + 2 * C * VOCABULARY
    assert model.flops(M) == N * latent + M * 4 * C**2


@pytest.mark.slow
def test_b11_one_layer_learns_to_copy_in_reverse_order():
    """A row is random bytes and the same bytes in reverse order. The second half is predictable."""
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


def test_image_positions_are_the_column_row_and_channel_of_each_byte():
    """START is row 1 of each table, and a byte at c is row c + 2, as in the authors' data."""
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
def test_e2_loss_of_every_byte_value_is_positive(value: int):
    nats = build()(torch.full((1, T), value))[:, -N:]
    assert torch.isfinite(nats).all()
    assert (nats > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stride", "rows"),
    [(N, 3), (N // 2, 16), *(pytest.param(*shape, marks=pytest.mark.long) for shape in [(N, 1), (N, 64), (3, 5)])],
)
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


@pytest.mark.slow
def test_trained_model_works_with_any_number_of_latents(mixed: Corpus):
    model = build(double=False)
    for latents in (1, 3, T):
        model.latents = latents
        assert stride_of(model) == latents
        with torch.no_grad():
            result = evaluate(lambda ids: model(torch.from_numpy(ids)), mixed, T, 64, stride=stride_of(model))
        assert result.total.bytes == mixed.raw_bytes
        assert len(generated(model, b"abc", T, top_k=5)) <= T


@pytest.mark.slow
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
    assert list(generated(model, bytes(prompt), count, seed=4)) == expected[2:]
    assert list(generated(model, bytes(prompt), count, seed=5)) != expected[2:]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [b"", b"abcd", bytes(range(60))])
def test_e5_generation_continues_past_latents_and_context(prompt: bytes):
    model = build(double=False)
    with torch.no_grad():
        model.head.bias[SEPARATOR] = -100.0
    assert len(generated(model, prompt, 4 * T)) == 4 * T


def test_start_is_never_predicted():
    logits = build().decoder(ROWS).prime(random_ids()[:, :3])
    assert logits.shape == (ROWS, VOCABULARY)
    assert START == VOCABULARY


@pytest.mark.slow
@pytest.mark.parametrize(("what", "bound"), [("random", 0.05), ("constant", 0.01)])
def test_e6_model_learns_to_predict_one_batch(what: str, bound: float):
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


def test_variance_of_initial_weights_equals_that_of_the_authors_code():
    model = build(double=False, latent_model={"width": 256, "layers": 1, "heads": 4})
    weight = model.blocks[1].feed_forward.contract.weight
    assert weight.std().item() == pytest.approx(1024**-0.5, rel=0.02)
    assert weight.abs().max().item() <= 2 * 1024**-0.5 / 0.8796
    assert model.embedding.weight.std().item() == pytest.approx(0.8796, rel=0.02)
    assert not model.blocks[1].feed_forward.contract.bias.any()


def test_feed_forward_layer_squares_the_output_of_the_relu():
    layer = build().blocks[1].feed_forward
    x = torch.randn(3, 32, dtype=torch.double)
    hidden = (x @ layer.expand.weight.T + layer.expand.bias).clamp(min=0) ** 2
    torch.testing.assert_close(layer(x), hidden @ layer.contract.weight.T + layer.contract.bias)


def test_dropout_applies_to_residuals_and_not_to_attention_weights():
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
