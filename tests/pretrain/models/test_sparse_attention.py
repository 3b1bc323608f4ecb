"""Laws of the Sparse Transformer's attention (arXiv:1904.10509), in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.vocabulary import SEPARATOR
from pretrain.config.loading import load
from pretrain.estimate.activations import on_meta
from pretrain.models.blocks.sparse_attention import sparse_attention
from pretrain.models.blocks.sparse_pattern import SparsePattern, sparse_masks
from pretrain.models.families.transformer import Transformer, TransformerConfig
from tests.test_project import ROOT

T, LAYERS = 24, 2
FIXED = {"attention": "fixed", "attention_stride": 8, "attention_summary": 2, "attention_groups": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "strided": {"attention": "strided", "attention_stride": 5, "positions": "grid"},
    "strided, interleaved": {"attention": "strided", "attention_stride": 5, "attention_layers": "interleaved"},
    "fixed": FIXED | {"positions": "grid"},
    "fixed, interleaved": FIXED | {"attention_layers": "interleaved", "attention_groups": 1},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(**changes: Any) -> Transformer:
    fields = {"sequence_length": T, "width": 16, "layers": LAYERS, "heads": 4, "dropout": 0.0, "initial_std": 0.3}
    torch.manual_seed(0)
    return Transformer(TransformerConfig.model_validate(fields | changes)).double().eval()


def explicit_mask(pattern: SparsePattern, length: int) -> Tensor:
    """Return the (groups, length, length) pairs of section 4.2, with the near window of the authors' code."""
    stride = pattern.stride
    near, far = (torch.zeros(pattern.groups, length, length, dtype=torch.bool) for _ in range(2))
    for i in range(length):
        for j in range(i + 1):
            near[:, i, j] = i - j < stride if pattern.kind == "strided" else i // stride == j // stride
            for group in range(pattern.groups):
                end = stride - group * pattern.summary
                is_summary = j % stride in range(end - pattern.summary, end)
                far[group, i, j] = (i - j) % stride == 0 if pattern.kind == "strided" else is_summary
    far |= torch.eye(length, dtype=torch.bool)
    return {"both": near | far, "near": near, "far": far}[pattern.part]


def random_qkv(length: int, seed: int, *, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(2, 4, length, 4, dtype=torch.double, generator=generator) for _ in range(3)]
    return [x.requires_grad_(grad) for x in draws]


patterns = st.builds(
    SparsePattern,
    st.sampled_from(["strided", "fixed"]),
    st.integers(4, 9),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.sampled_from(["both", "near", "far"]),
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(patterns, st.integers(1, 40), st.booleans(), st.integers(0, 2**32 - 1))
def test_sparse_attention_is_dense_attention_under_the_papers_pairs(
    pattern: SparsePattern, length: int, within: bool, seed: int
):
    if pattern.kind == "strided":
        pattern = SparsePattern("strided", pattern.stride, part=pattern.part)
    q, k, v = random_qkv(length, seed)
    visible = explicit_mask(pattern, length).repeat(4 // pattern.groups, 1, 1)[None]
    documents = None
    if within:
        documents = (torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.15).cumsum(1)
        visible = visible & (documents[:, :, None] == documents[:, None])[:, None]
    masks = sparse_masks([pattern], length, documents, q.device, in_blocks=False)[pattern.part]
    expected = (q @ k.transpose(2, 3) / 2).masked_fill(~visible, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(sparse_attention(q, k, v, pattern, masks, 0.0), expected, atol=1e-12, rtol=0)


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask, return_aux: Any) -> tuple[Tensor, Any]:
    """Do what FlexAttention does on CUDA. A CPU has no backward pass of it."""
    visible = create_mask(block_mask.mask_mod, len(q), q.shape[1], q.shape[2], k.shape[2], device="cpu")
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~visible, -1e9)
    log_sum, some = scores.logsumexp(-1), visible.any(-1)
    mixed = (scores.softmax(-1) @ v) * some[..., None]
    return mixed, SimpleNamespace(lse=log_sum.masked_fill(~some, -torch.inf))


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("part", ["both", "near", "far"])
@pytest.mark.parametrize(("kind", "summary", "groups"), [("strided", 1, 1), ("fixed", 3, 2)])
def test_flex_attention_of_both_parts_has_the_numbers_and_gradients_of_block_products(
    kind: Any, summary: int, groups: int, part: Any, within: bool, monkeypatch: pytest.MonkeyPatch
):
    """300 positions cross tiles of 128. Positions of the first block see no far key."""
    monkeypatch.setattr("pretrain.models.blocks.attention._compiled", lambda kernel: dense_kernel)
    pattern, length = SparsePattern(kind, 24, summary, groups, part), 300
    q, k, v = random_qkv(length, 0, grad=True)
    documents = (torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.02).cumsum(1)
    results = []
    for in_blocks in (False, True):
        masks = sparse_masks([pattern], length, documents if within else None, q.device, in_blocks=in_blocks)[part]
        mixed = sparse_attention(q, k, v, pattern, masks, 0.0)
        results.append((mixed, *torch.autograd.grad(mixed.square().sum(), [q, k, v])))
        if in_blocks:
            assert_blocks_hold_all_pairs([mask for mask in (masks.near, masks.far) if mask is not None])
    for products, flex in zip(*results, strict=True):
        torch.testing.assert_close(flex, products, atol=1e-10, rtol=0)


def assert_blocks_hold_all_pairs(masks: list[Any]) -> None:
    """Check that no tile with a visible pair is left out, and that most causal tiles of long rows are."""
    for mask in masks:
        found = create_block_mask(mask.mask_mod, 2, 4, *mask.seq_lengths, device="cpu").to_dense().bool()
        assert bool((mask.to_dense().bool() | ~found).all())


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_flex_attention_leaves_out_most_tiles_of_a_long_row(kind: Any):
    """At 12,288 positions and a stride of 128, causal attention has 4,656 tiles of 128 by 128."""
    pattern = SparsePattern(kind, 128, 32)
    masks = sparse_masks([pattern], 12_288, None, torch.device("cpu"), in_blocks=True)["both"]
    tiles = sum(int(mask.kv_num_blocks.sum()) for mask in (masks.near, masks.far))  # type: ignore[union-attr]
    assert tiles < 4656 / 3


@variants
@torch.no_grad()
def test_decoder_agrees_with_forward_for_every_prefix_and_keeps_what_later_positions_see(variant: str):
    for within in (False, True):
        model = build(**VARIANTS[variant], attention_across_documents=not within)
        ids = torch.randint(0, 257, (2, T), generator=torch.Generator().manual_seed(1))
        ids[:, [3, 9, 16]] = SEPARATOR
        expected = model(ids)
        stepped = model.decoder(2)
        logits = stepped.prime(ids[:, :0])
        for prefix in range(T):
            primed = model.decoder(2).prime(ids[:, :prefix])
            torch.testing.assert_close(primed, logits, atol=1e-10, rtol=0)
            nats = -logits.log_softmax(-1).gather(1, ids[:, prefix : prefix + 1])[:, 0]
            torch.testing.assert_close(nats.float(), expected[:, prefix], atol=1e-5, rtol=0)
            if prefix + 1 < T:
                logits = stepped.step(ids[:, prefix])
        kept = [cache.kept for cache in stepped._caches]
        whole_blocks, summary = T // 8, 2
        assert (
            kept
            == {
                "strided": [T, T],
                "strided, interleaved": [4, T],
                "fixed": [whole_blocks * summary] * 2,
                "fixed, interleaved": [0, whole_blocks * summary],
            }[variant]
        )


@pytest.mark.parametrize("variant", ["strided, interleaved", "fixed, interleaved"])
def test_two_interleaved_layers_see_every_earlier_byte_and_no_later_one(variant: str):
    """Section 4.1: a path of at most p + 1 positions connects any two."""
    model = build(**VARIANTS[variant])
    ids = torch.randint(0, 256, (1, T), generator=torch.Generator().manual_seed(1))
    changed = ids.repeat(T, 1)
    changed.diagonal().add_(1).remainder_(256)

    def log_probabilities(rows: Tensor) -> Tensor:
        x = model.embed(rows[:, :-1])
        return model.logits(model.stack(x, None, model.visible(None, x))).log_softmax(-1)

    moved = (log_probabilities(changed) - log_probabilities(ids)).abs().amax(-1)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert bool((moved[later] > 1e-12).all())
    assert bool((moved[~later] == 0).all())


@variants
@pytest.mark.parametrize("length", [1, 13, T])
def test_flops_are_those_of_the_products(variant: str, length: int):
    model = build(**VARIANTS[variant])
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long))
    assert counter.get_total_flops() == model.flops(length)


def test_recipe_of_enwik8_has_the_papers_size_and_a_ninth_of_the_pairs():
    """Table 1: 95M parameters. Pairs of a query: 128 near ones, and 32 of each of 96 blocks."""
    config = load(ROOT / "configs/transformer/sparse-enwik8.yaml").model
    model = on_meta(config)
    assert model.parameter_count() == pytest.approx(95e6, rel=0.01)
    (pattern,) = config.patterns
    assert pattern.pairs(12_288) == 12_288 * (128 + 96 * 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "strided"}, "needs attention_stride"),
        ({"attention_stride": 4}, "attention_stride needs attention: strided or fixed"),
        ({"positions": "grid"}, "positions: grid needs attention"),
        (FIXED | {"window": 4}, "exclude each other"),
        (FIXED | {"attention_summary": 5}, "do not fit into blocks of 8"),
        (FIXED | {"attention_groups": 3}, "does not divide heads"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        build(**fields)
