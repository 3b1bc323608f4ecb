"""Laws of Transformer-XL (arXiv:1901.02860, section 3). Exact laws are tested in float64."""

import math

import pytest
import torch
from torch import Tensor

from data_pipeline.vocabulary import SEPARATOR, VOCABULARY
from pretrain.models.base import Memory
from pretrain.models.blocks.positions import Rotary, rotate, sinusoids
from pretrain.models.families.transformer_xl import (
    NOTHING,
    RelativePositions,
    SegmentAttention,
    SegmentContext,
    TransformerXL,
    TransformerXLConfig,
    shift_left,
    visible_keys,
)

ROWS, T, LAYERS = 2, 6, 3

positions = pytest.mark.parametrize("positions", ["relative", "rotary"])
AUTHORS = {"norm": "post", "scale_embeddings": True, "biases": True, "dropout_places": "everywhere"}
"""Options that make the model that of the authors' code."""
memories = pytest.mark.parametrize("memory_length", [0, 1, 4, T, 15, 40])


def build(double: bool = True, **changes: object) -> TransformerXL:
    fields = {
        "sequence_length": T,
        "memory_length": T,
        "width": 32,
        "layers": LAYERS,
        "heads": 4,
        "dropout": 0.0,
        "initial_std": 0.3,  # large, so that a wrong dependence shows
    }
    torch.manual_seed(0)
    model = TransformerXL(TransformerXLConfig.model_validate(fields | changes)).eval()
    return model.double() if double else model


def random_ids(rows: int = ROWS, length: int = T, seed: int = 1, top: int = 256) -> Tensor:
    return torch.randint(0, top, (rows, length), generator=torch.Generator().manual_seed(seed))


def nats_of(model: TransformerXL, ids: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
    """Return the result of `forward_segment` in the model's own dtype."""
    states, memory = model.run_segment(ids, memory or {})
    return -model.logits(states).log_softmax(-1).gather(-1, ids[..., None])[..., 0], memory


def segment_by_segment(model: TransformerXL, ids: Tensor, lengths: list[int]) -> tuple[Tensor, Memory]:
    nats, memory = [], {}
    for segment in ids.split(lengths, 1):
        some, memory = nats_of(model, segment, memory)
        nats.append(some)
    return torch.cat(nats, 1), memory


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (4, 4), (4, 9), (6, 12)])
def test_c6_the_shift_is_explicit_relative_indexing(queries: int, keys: int):
    scores = torch.randn(2, 3, queries, keys)
    shifted = shift_left(scores)
    assert shifted.shape == scores.shape
    for i in range(queries):
        for j in range(i + keys - queries + 1):
            distance = (i + keys - queries) - j
            assert torch.equal(shifted[..., i, j], scores[..., i, keys - 1 - distance])


@pytest.mark.parametrize("kept", [0, 3, 7])
def test_c6_attention_is_the_papers_formula_term_by_term(kept: int):
    """A_ij = q_i k_j + q_i W_kR R_(i-j) + u k_j + v W_kR R_(i-j), over the root of d, causal (section 3.3)."""
    torch.manual_seed(0)
    D, heads, length = 16, 2, 5
    d = D // heads
    attention = SegmentAttention(D, heads, dropout=0.0).double()
    model = build(width=D, heads=heads)
    x, memory = torch.randn(1, length, D).double(), torch.randn(1, kept, D).double()
    keys = kept + length
    context = SegmentContext(visible_keys(torch.zeros(1, keys, dtype=torch.long), length), model.relative(keys))
    got = attention(x, memory if kept else None, context)[0]

    W_q, W_k, W_v = attention.query_key_value.weight.view(3, heads, d, D)
    W_r = attention.distance_key.weight.view(heads, d, D)
    every = torch.cat([memory, x], 1)[0]
    expected = torch.zeros(length, D, dtype=torch.double)
    for h in range(heads):
        u, v = model.content_bias[h], model.position_bias[h]
        for i in range(length):
            q = W_q[h] @ x[0, i]
            scores, values = [], []
            for j in range(kept + i + 1):
                k, distance = W_k[h] @ every[j], kept + i - j
                r = W_r[h] @ sinusoids(torch.tensor([distance]), D)[0].double()
                scores.append((q @ k + q @ r + u @ k + v @ r) / math.sqrt(d))
                values.append(W_v[h] @ every[j])
            weights = torch.stack(scores).softmax(0)
            expected[i, h * d : (h + 1) * d] = weights @ torch.stack(values)
    assert_same(got, expected @ attention.output.weight.T)


def test_gradients_of_relative_attention_equal_numerical_derivatives():
    """A fused kernel adds the bias of u, v and the distances as its mask."""
    torch.manual_seed(0)
    attention = SegmentAttention(8, 2, dropout=0.0).double()
    visible = visible_keys(torch.tensor([[0, 0, 0, 0, 1, 1]]), queries=4)
    distances = sinusoids(torch.arange(5, -1, -1), 8).double()

    def attend(x: Tensor, memory: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return attention(x, memory, SegmentContext(visible, RelativePositions(distances, u, v)))

    shapes = [(1, 4, 8), (1, 2, 8), (2, 4), (2, 4)]
    assert torch.autograd.gradcheck(attend, [torch.randn(s, dtype=torch.double, requires_grad=True) for s in shapes])


def test_sinusoids_equal_the_papers_formula():
    """R_i = (sin(i w_0), sin(i w_1), ..., cos(i w_0), ...), w_k = 10000^(-2k/D), farthest distance first."""
    table = build(width=6, heads=1).relative(4).distances
    for row, distance in enumerate((3, 2, 1, 0)):
        angles = [distance * 10_000 ** (-2 * k / 6) for k in range(3)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert table[row].tolist() == pytest.approx(expected, abs=1e-6)


def test_rotary_scores_depend_only_on_distances():
    q, k = torch.randn(2, 1, 1, 5, 8, dtype=torch.double)
    scores = []
    for first in (0, 100):
        places = torch.arange(first, first + 5)
        scores.append(rotate(q, places, Rotary()) @ rotate(k, places, Rotary()).transpose(2, 3))
    torch.testing.assert_close(*scores, atol=1e-10, rtol=0)


@positions
def test_c1_row_t_depends_on_every_byte_before_t_and_on_nothing_after(positions: str):
    model = build(positions=positions, sequence_length=16)
    ids = random_ids(1, 16)
    hidden: list[Tensor] = []
    model.norm.register_forward_hook(lambda _, __, out: hidden.append(out[0]))
    model(ids)
    base = hidden.pop()
    for u in range(16):
        changed = ids.clone()
        changed[0, u] = (changed[0, u] + 1) % 256
        model(changed)
        moved = (hidden.pop() - base).abs().amax(-1)
        assert torch.equal(moved[: u + 1], torch.zeros_like(moved[: u + 1])), f"byte {u} leaks"
        assert (moved[u + 1 :] > 1e-12).all(), f"byte {u} is not seen everywhere after it"


@positions
def test_c2_segments_without_memory_are_independent(positions: str):
    model = build(positions=positions, memory_length=0)
    ids = random_ids(length=3 * T)
    nats, memory = segment_by_segment(model, ids, [T] * 3)
    assert memory == {}
    assert_same(nats, torch.cat([nats_of(model, segment)[0] for segment in ids.split(T, 1)], 1))


@pytest.mark.slow
@positions
@pytest.mark.parametrize("options", [{}, AUTHORS], ids=["own", "authors"])
@pytest.mark.parametrize("lengths", [[T] * 4, [1] * 24, [5, 1, 6, 6, 2, 4], [6, 6, 6, 3, 3]])
def test_c3_segments_with_a_memory_of_everything_earlier_equal_one_long_forward(
    positions: str, lengths: list[int], options: dict[str, object]
):
    model = build(positions=positions, memory_length=24, **options)
    long = build(positions=positions, sequence_length=24, memory_length=0, **options)
    ids = random_ids(length=24)
    ids[0, [3, 11, 17]] = SEPARATOR
    assert_same(segment_by_segment(model, ids, lengths)[0], nats_of(long, ids)[0])


@positions
def test_c4_no_gradient_flows_into_memory(positions: str):
    model = build(positions=positions)
    first, second = random_ids(length=2 * T).split(T, 1)
    nats, memory = nats_of(model, first)
    assert nats.requires_grad
    assert not any(tensor.requires_grad for tensor in memory.values())
    nats_of(model, second, memory)[0].sum().backward()
    read = torch.cat([first[:, -1:], second[:, :-1]], 1).unique()
    only_in_memory = [i for i in first[:, :-1].unique().tolist() if i not in read]
    head_alone = [i for i in range(256) if i not in torch.cat([first, second])]
    assert only_in_memory
    grad = model.embedding.weight.grad  # rows of ids that only memory has read get a gradient only from the head
    with torch.no_grad():
        hidden: list[Tensor] = []
        handle = model.norm.register_forward_hook(lambda _, __, out: hidden.append(out))
        model.forward_segment(second, memory)
        handle.remove()
    logits = hidden[0] @ model.embedding.weight.T
    residual = logits.softmax(-1) - torch.nn.functional.one_hot(second, VOCABULARY)
    head = torch.einsum("btv,btd->vd", residual, hidden[0])
    assert_same(grad[only_in_memory], head[only_in_memory])
    assert_same(grad[head_alone], head[head_alone])


@pytest.mark.slow
@positions
def test_c5_bytes_older_than_layers_times_memory_are_not_seen(positions: str):
    """A memory of one segment reaches LAYERS segments back, and the byte that the first position there reads."""
    model = build(positions=positions)
    segments = LAYERS + 3
    ids = random_ids(1, segments * T)
    base = segment_by_segment(model, ids, [T] * segments)[0][:, -T:]
    horizon = (segments - 1) * T - LAYERS * T - 1
    for u in range((segments - 1) * T):
        changed = ids.clone()
        changed[0, u] = (changed[0, u] + 1) % 256
        moved = (segment_by_segment(model, changed, [T] * segments)[0][:, -T:] - base).abs().max().item()
        assert (moved > 0) == (u >= horizon), f"byte {u}"


@pytest.mark.slow
@memories
@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 3, 6], [1, 2, 1], [2, 6, 1]])
def test_c7_memory_keeps_the_last_states_of_the_previous_memory_and_the_segment(memory_length: int, lengths: list[int]):
    """Segment and memory may differ in length, which the authors' code handles wrongly."""
    model = build(memory_length=memory_length)
    ids = random_ids(length=sum(lengths))
    seen: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for states, block in zip(seen, model.blocks, strict=True):
        block.register_forward_pre_hook(lambda _, inputs, states=states: states.append(inputs[0].detach()))
    memory = segment_by_segment(model, ids, lengths)[1]
    if memory_length == 0:
        assert memory == {}
        return
    kept = min(memory_length, sum(lengths))
    for layer in range(LAYERS):
        assert torch.equal(memory["states"][:, layer], torch.cat(seen[layer], 1)[:, -kept:])
    assert torch.equal(memory["ids"], ids[:, -kept:])


@pytest.mark.slow
@positions
@memories
@pytest.mark.parametrize("border", [0, 2, T - 1])
def test_c9_document_does_not_see_the_previous_document(positions: str, memory_length: int, border: int):
    """Rows after a separator, in memory or in the segment, equal those of a fresh start after a separator."""
    model = build(positions=positions, memory_length=memory_length)
    ids, changed = random_ids(length=4 * T), random_ids(length=4 * T)
    ids[:, T + border] = changed[:, T + border] = SEPARATOR
    changed[:, : T + border] = random_ids(length=T + border, seed=2)
    after = slice(T + border + 1, None)
    got = segment_by_segment(model, ids, [T] * 4)[0][:, after]
    assert torch.equal(segment_by_segment(model, changed, [T] * 4)[0][:, after], got)
    fresh = segment_by_segment(model, ids[:, T + border :], [T - border, T, T])[0][:, 1:]
    exact = positions == "relative"  # rotary angles are fp32, and their places in the row differ
    torch.testing.assert_close(got, fresh, atol=1e-10 if exact else 1e-4, rtol=0)


@positions
def test_forward_returns_the_loss_of_each_byte(positions: str):
    model = build(positions=positions)
    first, second = random_ids(length=2 * T).split(T, 1)
    nats, memory = model.forward_segment(first, {})
    assert nats.dtype == torch.float32
    assert torch.equal(nats, model(first))
    torch.testing.assert_close(nats.double(), nats_of(model, first)[0], atol=1e-5, rtol=0)
    exact = nats_of(model, second, memory)[0]
    torch.testing.assert_close(model.forward_segment(second, memory)[0].double(), exact, atol=1e-5, rtol=0)


def test_c9_previous_segment_is_seen_if_no_separator_follows_it():
    model = build()
    first, second = random_ids(length=2 * T).split(T, 1)
    memory = model.forward_segment(first, {})[1]
    assert (model.forward_segment(second, memory)[0] - model(second)).abs().max() > 0.1


def test_rows_do_not_see_each_other():
    model = build()
    ids = random_ids(4, 3 * T, top=257)
    together = segment_by_segment(model, ids, [T] * 3)[0]
    for row in range(4):
        assert_same(segment_by_segment(model, ids[row : row + 1], [T] * 3)[0], together[row : row + 1])


@pytest.mark.slow
@positions
@pytest.mark.parametrize("memory_length", [1, 4, 2 * T, 40])
def test_empty_memory_equals_no_memory(positions: str, memory_length: int):
    """Some rows may have an empty memory and others not."""
    model = build(positions=positions, memory_length=memory_length)
    ids = random_ids(3, 4 * T)
    ids[0, 2 * T + 1] = SEPARATOR
    expected, memory = segment_by_segment(model, ids, [T] * 4)
    nats, after = nats_of(model, ids[:, :T], model.empty_memory(3))
    assert_same(nats, expected[:, :T])
    assert {name: tensor.shape for name, tensor in after.items()} == {
        "states": (3, LAYERS, memory_length, 32),
        "ids": (3, memory_length),
    }
    empty = model.empty_memory(3)
    memory = {
        name: torch.where(torch.arange(3).view(-1, *[1] * (tensor.dim() - 1)) == 1, empty[name], tensor)
        for name, tensor in after.items()
    }
    second = nats_of(model, ids[:, T : 2 * T], memory)[0]
    assert_same(second[[0, 2]], expected[[0, 2], T : 2 * T])
    assert_same(second[1], nats_of(model, ids[1:2, T : 2 * T])[0][0])


def test_memory_kept_in_fp32_is_exact():
    """Engines and checkpoints keep the memory in fp32, also of a model in bf16."""
    model = build(double=False).bfloat16()
    first, second = random_ids(length=2 * T, top=257).split(T, 1)
    memory = model(first, model.empty_memory(ROWS))[1]
    kept = {name: tensor.float() for name, tensor in memory.items()}
    assert torch.equal(model(second, kept)[0], model(second, memory)[0])
    assert (memory["ids"] != NOTHING).all()


@pytest.mark.slow
@positions
@memories
@pytest.mark.parametrize("options", [{}, AUTHORS], ids=["own", "authors"])
@pytest.mark.parametrize("prefix", [0, 1, T - 1, T, T + 1, 2 * T, 17])
def test_cached_decoding_equals_forward_segment_through_all_segments(
    positions: str, memory_length: int, prefix: int, options: dict[str, object]
):
    model = build(positions=positions, memory_length=memory_length, **options)
    ids = random_ids(length=4 * T)
    ids[0, [3, T - 1, 3 * T + 2]] = SEPARATOR
    expected = segment_by_segment(model, ids, [T] * 4)[0]
    decoder = model.decoder(ROWS)
    logits = decoder.prime(ids[:, :prefix])
    for t in range(prefix, 4 * T):
        assert decoder.length == t
        nats = -logits.log_softmax(-1).gather(1, ids[:, t : t + 1])[:, 0]
        assert_same(nats, expected[:, t])
        logits = decoder.step(ids[:, t])


@pytest.mark.parametrize(
    ("layers", "width", "feed_forward_width", "length", "millions"),
    [(12, 512, 2048, 512, 41), (24, 1024, 3072, 768, 277)],
)
def test_parameters_of_the_papers_enwik8_models(
    layers: int, width: int, feed_forward_width: int, length: int, millions: int
):
    """A layer has 5 D^2 (W_q, W_k, W_v, W_k,R, output) and 2 D F (feed-forward). The paper states 41M and 277M."""
    with torch.device("meta"):
        model = build(
            double=False,
            layers=layers,
            width=width,
            heads=8,
            feed_forward_width=feed_forward_width,
            sequence_length=length,
            memory_length=length,
        )
    weights = layers * (5 * width**2 + 2 * width * feed_forward_width)
    others = VOCABULARY * width + 3 * width + (2 * layers + 1) * 2 * width
    assert model.parameter_count() == weights + others
    assert weights / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.006, 0.02])
def test_e1_first_loss_equals_the_formula_of_a_tied_head(std: float):
    """log2 V + s^2 D / (2 ln 2) bits, for a head with weights of deviation s on normed activations of D channels."""
    D = 256
    model = build(double=False, initial_std=std, sequence_length=128, width=D, layers=2)
    ids = random_ids(64, 128)
    cut = 0.7737  # variance of a normal distribution truncated at two deviations, in units of s^2
    expected = math.log2(VOCABULARY) + cut * std**2 * D / (2 * math.log(2))
    with torch.no_grad():
        assert model(ids).mean().item() / math.log(2) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("value", [0, 255])
def test_e2_loss_of_every_byte_value_is_positive(value: int):
    nats = build()(torch.full((1, T), value))
    assert torch.isfinite(nats).all()
    assert (nats > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@positions
@pytest.mark.parametrize("options", [{}, AUTHORS], ids=["own", "authors"])
def test_dropout_and_gradients_reach_every_parameter(positions: str, options: dict[str, object], dtype: torch.dtype):
    model = build(double=False, dropout=0.1, positions=positions, **options).to(dtype).train()
    nats, memory = model.forward_segment(random_ids(), {})
    (nats.sum() + model.forward_segment(random_ids(seed=2), memory)[0].sum()).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.slow
@positions
@pytest.mark.parametrize("what", ["random", "constant"])
def test_e6_model_learns_to_predict_one_batch(positions: str, what: str):
    model = build(double=False, initial_std=0.02, positions=positions, sequence_length=24).train()
    ids = random_ids(1, 24) if what == "random" else torch.full((4, 24), 7)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(600):
        bits = model(ids).mean() / math.log(2)
        if bits < 0.05:
            return
        optimizer.zero_grad()
        bits.backward()
        optimizer.step()
    raise AssertionError(f"{bits.item():.3f} bits a byte after 600 steps")


@pytest.mark.slow
def test_memory_predicts_repeated_bytes_that_one_segment_cannot():
    """Random bytes come twice, a segment apart. Only memory can predict the second time."""
    model = build(double=False, initial_std=0.02, sequence_length=8, memory_length=8, heads=2, layers=2).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    bits = math.inf
    for _ in range(1500):
        ids = torch.randint(0, 16, (32, 8), generator=generator)
        _, memory = model.forward_segment(ids, {})
        loss = model.forward_segment(ids, memory)[0].mean() / math.log(2)
        bits = loss.item()
        if bits < 1.0:
            return  # chance is 4 bits
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"{bits:.2f} bits a byte")


def test_post_norm_block_is_the_papers_formula():
    """The output is LayerNorm(h + FF(h)) with h = LayerNorm(x + attention(x, memory)), without a final norm."""
    model = build(**AUTHORS)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda block, arguments, out: seen.extend((*arguments[:2], out)))
    first, second = random_ids(length=2 * T).split(T, 1)
    memory = model.forward_segment(first, {})[1]
    seen.clear()
    states, _ = model.run_segment(second, memory)
    x, before, out = seen
    last = torch.cat([first[:, -1:], second[:, :-1]], 1)
    assert_same(x, math.sqrt(32) * model.embedding.weight[last])
    block = model.blocks[0]
    context = SegmentContext(visible_keys(torch.zeros(ROWS, 2 * T, dtype=torch.long), T), model.relative(2 * T))

    def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    h = norm(x + block.attention(x, before, context), block.attention_norm)
    maps = block.feed_forward
    hidden = (h @ maps.expand.weight.T + maps.expand.bias).relu()
    assert_same(out, norm(h + hidden @ maps.contract.weight.T + maps.contract.bias, block.feed_forward_norm))
    assert_same(model.logits(states), states @ model.embedding.weight.T + model.head_bias)
    assert states.mean(-1).abs().max() < 1e-6  # the last block's norm is the last one; its bias begins at 0


def test_dropout_everywhere_drops_the_authors_places_and_attention_has_its_own_share():
    model = build(**AUTHORS | {"dropout": 0.5}, attention_dropout=0.0, width=64, sequence_length=64).train()
    zeros: dict[str, float] = {}
    model.blocks[0].register_forward_pre_hook(
        lambda _, xs: zeros.update(input=share(xs[0]), distances=share(xs[2].relative.distances))
    )
    model.blocks[0].feed_forward.contract.register_forward_pre_hook(lambda _, xs: zeros.update(hidden=share(xs[0])))
    zeros["head"] = share(model.run_segment(random_ids(length=64), {})[0])

    expected = {"input": 0.5, "distances": 0.5, "head": 0.5, "hidden": 0.75}  # relu zeroes half of the hidden channels
    assert zeros == pytest.approx(expected, abs=0.05)
    assert {block.attention.dropout for block in model.blocks} == {0.0}
    assert {block.attention.dropout for block in build(dropout=0.3).blocks} == {0.3}


def share(x: Tensor) -> float:
    """Return the share of zeros in a tensor."""
    return (x == 0).double().mean().item()


def test_a_segment_longer_than_sequence_length_is_refused():
    with pytest.raises(ValueError, match="longer than the model's"):
        build()(random_ids(length=T + 1))
