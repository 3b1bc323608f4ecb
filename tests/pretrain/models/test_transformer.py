"""Laws of the Transformer with full and sliding-window attention. Exact laws are tested in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.vocabulary import VOCABULARY
from pretrain.models.blocks import attention as attention_module
from pretrain.models.blocks.attention import attention, causal_attention, window_attention
from pretrain.models.families.transformer import Transformer, TransformerConfig

ROWS, T, LAYERS = 2, 24, 3

VARIANTS: dict[str, dict[str, object]] = {
    "rotary": {},
    "learned": {"positions": "learned"},
    "window 1": {"window": 1},
    "window 5": {"window": 5},
    "window 8, learned": {"window": 8, "positions": "learned"},
    "window as long as the sequence": {"window": T},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(double: bool = True, **changes: object) -> Transformer:
    fields = {
        "sequence_length": T,
        "width": 32,
        "layers": LAYERS,
        "heads": 4,
        "dropout": 0.0,
        "initial_std": 0.3,  # large, so that a wrong dependence shows
    }
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.model_validate(fields | changes)).eval()
    return model.double() if double else model


def random_ids(rows: int = ROWS, length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(0, 257, (rows, length), generator=torch.Generator().manual_seed(seed))


def log_probabilities(model: Transformer, ids: Tensor) -> Tensor:
    """Return log probabilities (rows, T, VOCABULARY)."""
    return model.logits(model.stack(model.embed(ids[:, :-1]))).log_softmax(-1)


@pytest.mark.slow
@variants
def test_c1_row_t_depends_on_every_byte_in_reach_before_t_and_on_nothing_after(variant: str):
    """A window of w lets each of L layers look w - 1 positions back, and position s reads byte s - 1."""
    model = build(**VARIANTS[variant])
    reach = T if model.window is None else LAYERS * (model.window - 1) + 1
    ids = random_ids(1)
    base = log_probabilities(model, ids)[0]
    for u in range(T):
        changed = ids.clone()
        changed[0, u] = (changed[0, u] + 1) % 256
        moved = (log_probabilities(model, changed)[0] - base).abs().amax(-1)
        seen = torch.zeros(T, dtype=torch.bool)
        seen[u + 1 : u + 1 + reach] = True
        assert torch.equal(moved[~seen], torch.zeros_like(moved[~seen])), f"byte {u} leaks"
        assert (moved[seen] > 1e-12).all(), f"byte {u} is not seen everywhere in its reach"


@variants
def test_forward_returns_the_loss_of_each_byte(variant: str):
    model = build(**VARIANTS[variant])
    ids = random_ids()
    nats = -log_probabilities(model, ids).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(model(ids).double(), nats, atol=1e-6, rtol=1e-6)
    assert model(ids).dtype == torch.float32


@pytest.mark.parametrize("window", [1, 2, 5, 8, 23, 24, 25])
@pytest.mark.parametrize("length", [1, 2, 8, 13, 24])
def test_window_attention_is_dense_attention_under_a_band(window: int, length: int):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, length, 4, dtype=torch.double)
    age = torch.arange(length)[:, None] - torch.arange(length)
    band = (age >= 0) & (age < window)
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(~band, -torch.inf)
    torch.testing.assert_close(window_attention(q, k, v, window, 0.0), scores.softmax(-1) @ v, atol=1e-12, rtol=0)


def test_a_window_as_long_as_the_sequence_is_full_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, T, 4, dtype=torch.double)
    assert torch.equal(window_attention(q, k, v, T, 0.0), causal_attention(q, k, v, 0.0))


def test_cache_of_a_window_keeps_the_positions_that_the_next_position_sees():
    model = build(window=5)
    decoder = model.decoder(ROWS)
    decoder.prime(random_ids(length=13))
    assert [cache.kept for cache in decoder._caches] == [4] * LAYERS
    assert [cache.length for cache in decoder._caches] == [14] * LAYERS


def papers_baseline(**changes: object) -> Transformer:
    """Return the model "320M" of MEGABYTE's table 15, without storage."""
    with torch.device("meta"):
        return build(double=False, width=1024, layers=22, heads=16, sequence_length=1024, **changes)


def test_a12_parameters_and_flops_of_the_papers_baseline():
    """276.8M weights (12 L D^2), the tables, and norms; 646M operations per byte: 2 weights + 2 L (2 T D)."""
    model = papers_baseline(positions="learned")
    stack = 12 * 22 * 1024**2
    assert stack == pytest.approx(276.8e6, rel=1e-3)
    tables = (VOCABULARY + 1024 + 1) * 1024
    assert model.parameter_count() == stack + tables + (2 * 22 + 1) * 2 * 1024
    assert model.flops(1024) / 1024 == 2 * (stack + VOCABULARY * 1024) + 4 * 22 * 1024 * 1024
    assert model.flops(1024) / 1024 == pytest.approx(646e6, rel=2e-3)


def test_flops_of_a_window_are_those_of_its_blocks_and_not_of_the_sequence():
    assert (
        papers_baseline(window=128).flops(1024)
        < papers_baseline(window=256).flops(1024)
        < papers_baseline().flops(1024)
    )


def test_a9_the_head_is_the_embedding():
    model = build()
    tables = [name for name, p in model.named_parameters() if p.shape[0] == VOCABULARY]
    assert tables == ["embedding.weight"]
    model(random_ids()).sum().backward()
    unread = torch.ones(VOCABULARY, dtype=torch.bool)
    unread[random_ids().unique()] = False
    assert (model.embedding.weight.grad[unread].abs().amax(-1) > 0).all()  # as the head alone


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.006, 0.02])
def test_e1_first_loss_equals_the_formula_of_a_tied_head(std: float):
    """log2 V + s^2 D / (2 ln 2) bits, for a head with weights of deviation s on normed activations of D channels."""
    D = 256
    model = build(double=False, initial_std=std, sequence_length=128, width=D, layers=2)
    ids = torch.randint(0, 256, (64, 128), generator=torch.Generator().manual_seed(0))
    cut = 0.7737  # variance of a normal distribution truncated at two deviations, in units of s^2
    # The head shares the input's table, so the byte just read has a slightly higher logit. Random bytes average it out.
    expected = math.log2(VOCABULARY) + cut * std**2 * D / (2 * math.log(2))
    with torch.no_grad():
        assert model(ids).mean().item() / math.log(2) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("value", [0, 255])
def test_e2_loss_of_every_byte_value_is_positive(value: int):
    nats = build()(torch.full((1, T), value))
    assert torch.isfinite(nats).all()
    assert (nats > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@variants
def test_dropout_and_gradients_reach_every_parameter(variant: str, dtype: torch.dtype):
    model = build(double=False, dropout=0.1, **VARIANTS[variant]).to(dtype).train()
    model(random_ids(length=T)).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        if VARIANTS[variant].get("window") != 1 or "attention" not in name:
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize(("what", "bound"), [("random", 0.05), ("constant", 0.01)])
def test_e6_model_learns_to_predict_one_batch(what: str, bound: float):
    model = build(double=False, initial_std=0.02, window=8).train()
    ids = random_ids(1) if what == "random" else torch.full((4, T), 7)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(600):
        bits = model(ids).mean() / math.log(2)
        if bits < bound:
            return
        optimizer.zero_grad()
        bits.backward()
        optimizer.step()
    raise AssertionError(f"{bits.item():.3f} bits a byte after 600 steps")


def test_a_row_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="longer than the model's"):
        build()(random_ids(length=T + 1))


def test_forward_equals_torchs_transformer_encoder():
    """The encoder is pre-norm, has the same weights, and a causal mask."""
    model = build(positions="learned")
    layer = torch.nn.TransformerEncoderLayer(
        32, 4, 128, dropout=0.0, batch_first=True, norm_first=True, bias=True, dtype=torch.double
    )
    reference = torch.nn.TransformerEncoder(
        layer, LAYERS, norm=torch.nn.LayerNorm(32, dtype=torch.double), enable_nested_tensor=False
    ).eval()
    state = {name: torch.zeros_like(value) for name, value in reference.state_dict().items()}  # no biases
    own = model.stack.state_dict()
    names = {
        "attention_norm": "norm1",
        "attention.query_key_value.weight": "self_attn.in_proj_weight",
        "attention.output": "self_attn.out_proj",
        "feed_forward_norm": "norm2",
        "feed_forward.expand": "linear1",
        "feed_forward.contract": "linear2",
        "blocks.": "layers.",
    }
    for name, value in own.items():
        theirs = name
        for mine, other in names.items():
            theirs = theirs.replace(mine, other)
        state[theirs] = value
    reference.load_state_dict(state)
    ids = random_ids()
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    hidden = reference(model.embed(ids[:, :-1]), mask=future)
    expected = F.linear(hidden, model.embedding.weight).log_softmax(-1)
    torch.testing.assert_close(log_probabilities(model, ids), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("of_rows", [1, 7])
def test_fused_attention_over_more_rows_than_a_kernel_takes_equals_that_of_each_row(
    of_rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention_module, "LARGEST_FUSED_BATCH", 3)
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, 2, 5, 8, requires_grad=True) for _ in range(3))
    visible = torch.rand(of_rows, 1, 5, 5) < 0.5
    visible |= torch.eye(5, dtype=torch.bool)
    rows = [slice(i, i + 1) for i in range(7)]
    each = torch.cat([attention(q[i], k[i], v[i], visible[i] if of_rows == 7 else visible) for i in rows])
    each_causal = torch.cat([causal_attention(q[i], k[i], v[i], 0.0) for i in rows])
    for got, expected in ((attention(q, k, v, visible), each), (causal_attention(q, k, v, 0.0), each_causal)):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        wanted = torch.autograd.grad(expected.square().sum(), [q, k, v], retain_graph=True)
        for a, b in zip(torch.autograd.grad(got.square().sum(), [q, k, v]), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
