"""Laws of the options of a trained Transformer-XL: a longer memory, clamped distances, and equal numbers of keys.

The authors' code has them as --mem_len, --clamp_len and --same_length.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.vocabulary import SEPARATOR
from pretrain.models import FamilyError, build_model, model_config, usage_of, with_usage_options
from pretrain.models.blocks.positions import sinusoids
from pretrain.models.families.transformer_xl import NOTHING, SegmentContext, TransformerXL, visible_keys
from tests.pretrain.models.test_transformer_xl import ROWS, T, assert_same, build, random_ids, segment_by_segment

SIZES = {"width": 32, "layers": 2, "heads": 4, "dropout": 0.0}
TRAINED = model_config({"family": "transformer_xl", "sequence_length": T, "memory_length": T, **SIZES})


def used(**usage: Any) -> TransformerXL:
    """Return the trained model as `eval` builds it with these options; underscores stand for hyphens."""
    model = build(layers=2)
    options = {name.replace("_", "-"): value for name, value in usage.items()}
    changed = build_model(with_usage_options(TRAINED, options)).double().eval()
    changed.load_state_dict(model.state_dict())
    assert isinstance(changed, TransformerXL)
    return changed


def nats_of(model: TransformerXL, ids: Tensor) -> Tensor:
    lengths = [T] * (ids.shape[1] // T) + [ids.shape[1] % T] * (ids.shape[1] % T > 0)
    return segment_by_segment(model, ids, lengths)[0]


@pytest.mark.slow
def test_option_with_the_memory_of_the_training_changes_nothing():
    ids = random_ids(length=4 * T, top=257)
    assert torch.equal(nats_of(used(memory=T), ids), nats_of(used(), ids))
    assert not torch.equal(nats_of(used(memory=2 * T), ids), nats_of(used(), ids))


@pytest.mark.slow
def test_clamp_beyond_every_distance_changes_nothing():
    ids = random_ids(length=4 * T)
    assert torch.equal(nats_of(used(memory=3 * T, clamp_length=4 * T), ids), nats_of(used(memory=3 * T), ids))
    assert not torch.equal(nats_of(used(memory=3 * T, clamp_length=T), ids), nats_of(used(memory=3 * T), ids))


@pytest.mark.slow
@pytest.mark.parametrize("clamp", [1, 3, T, 2 * T])
def test_attention_with_a_clamp_is_the_papers_formula_with_clamped_distances(clamp: int):
    """A_ij = q_i k_j + q_i W_kR R_d + u k_j + v W_kR R_d with d = min(i - j, clamp)."""
    model = used(memory=2 * T, clamp_length=clamp)
    layer = model.blocks[0].attention
    D, heads, kept = 32, 4, 2 * T
    d = D // heads
    torch.manual_seed(1)
    x, memory = torch.randn(1, T, D).double(), torch.randn(1, kept, D).double()
    visible = visible_keys(torch.zeros(1, kept + T, dtype=torch.long), T)
    got = layer(x, memory, SegmentContext(visible, model.relative(kept + T)))[0]

    W_q, W_k, W_v = layer.query_key_value.weight.view(3, heads, d, D)
    W_r = layer.distance_key.weight.view(heads, d, D)
    every = torch.cat([memory, x], 1)[0]
    expected = torch.zeros(T, D, dtype=torch.double)
    for h in range(heads):
        for i in range(T):
            q, scores, values = W_q[h] @ x[0, i], [], []
            for j in range(kept + i + 1):
                distance = min(kept + i - j, clamp)
                k, r = W_k[h] @ every[j], W_r[h] @ sinusoids(torch.tensor([distance]), D)[0].double()
                content, position = (q + model.content_bias[h]) @ k, (q + model.position_bias[h]) @ r
                scores.append((content + position) / math.sqrt(d))
                values.append(W_v[h] @ every[j])
            expected[i, h * d : (h + 1) * d] = torch.stack(scores).softmax(0) @ torch.stack(values)
    assert_same(got, expected @ layer.output.weight.T)


@given(queries=st.integers(1, 9), memory=st.integers(1, 9), kept=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_same_length_is_the_mask_of_the_authors_code(queries: int, memory: int, kept: int):
    """mem_transformer.py: triu(1 + mlen) + tril(-mask_shift_len) is what a query does not see."""
    kept = min(kept, memory)
    keys = kept + queries
    beyond = keys - memory
    shift = queries - beyond if beyond > 0 else queries
    ones = torch.ones(queries, keys)
    hidden = torch.triu(ones, 1 + kept) + torch.tril(ones, -shift)
    if shift == queries:
        hidden = torch.triu(ones, 1 + kept)
    assert torch.equal(visible_keys(torch.zeros(1, keys), queries, memory)[0, 0], hidden == 0)


@pytest.mark.slow
@given(lengths=st.lists(st.integers(1, T), min_size=1, max_size=5), memory=st.integers(1, 2 * T))
@settings(max_examples=15, deadline=None)
def test_scores_with_same_length_do_not_depend_on_where_segments_begin(lengths: list[int], memory: int):
    """Every position sees the last M positions, wherever its segment begins."""
    ids = random_ids(length=sum(lengths), top=257)
    model = used(memory=memory, same_length=True)
    byte_by_byte = segment_by_segment(model, ids, [1] * sum(lengths))[0]
    assert_same(segment_by_segment(model, ids, lengths)[0], byte_by_byte)


@pytest.mark.slow
@pytest.mark.parametrize(
    "usage",
    [
        {"memory": 0},
        {"memory": 2 * T + 1},
        {"memory": 2 * T, "clamp_length": 5},
        {"same_length": True},
        {"memory": 2, "same_length": True, "clamp_length": 1},
        {"memory": 3 * T, "same_length": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("prefix", [0, 1, 2 * T + 1])
def test_decoder_equals_the_forward_pass_with_each_option(usage: dict[str, Any], prefix: int):
    model = used(**usage)
    ids = random_ids(length=4 * T)
    ids[0, 3] = ids[1, 2 * T] = SEPARATOR
    expected = nats_of(model, ids)
    decoder = model.decoder(ROWS)
    logits = decoder.prime(ids[:, :prefix])
    for t in range(prefix, ids.shape[1]):
        nats = -logits.log_softmax(-1).gather(-1, ids[:, t : t + 1])[:, 0]
        assert_same(nats, expected[:, t])
        logits = decoder.step(ids[:, t])


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(FamilyError, match="--memory 0 --same-length True: same_length shows each position"):
        with_usage_options(TRAINED, {"memory": 0, "same-length": True})
    with pytest.raises(FamilyError, match="--clamp-length 0: Input should be greater than or equal to 1"):
        with_usage_options(TRAINED, {"clamp-length": 0})
    rotary = TRAINED.model_copy(update={"positions": "rotary"})
    with pytest.raises(FamilyError, match="clamp_length needs positions: relative, and positions is rotary"):
        with_usage_options(rotary, {"clamp-length": 4})


def test_usage_names_the_value_of_every_option():
    assert usage_of(TRAINED) == {"memory": T, "clamp-length": None, "same-length": False}
    assert used(memory=9).empty_memory(ROWS)["ids"].tolist() == [[NOTHING] * 9] * ROWS
