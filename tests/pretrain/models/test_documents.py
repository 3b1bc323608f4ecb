"""Attention within documents: each family sees all of a byte's document, and nothing before it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from data_pipeline.vocabulary import SEPARATOR
from pretrain.checkpoint import CheckpointStore
from pretrain.cli.models.weights import load_model
from pretrain.conformance import Subject
from pretrain.conformance.engines import build, check_activation_checkpointing, train
from pretrain.estimate.activations import measure_activations
from pretrain.models.blocks.attention import FEWEST_BLOCK_KEYS, takes_blocks, window_attention
from pretrain.models.blocks.documents import visible_in_documents, visible_in_patches, visible_in_window
from pretrain.models.families.megabyte import Megabyte
from pretrain.models.families.perceiver_ar import PerceiverAR

WITHIN = {"attention_across_documents": False}
ALL_SEEN: list[tuple[str, dict[str, Any]]] = [
    ("transformer", {"window": None, **WITHIN}),
    ("transformer", {"window": None, "positions": "learned", **WITHIN}),
    ("perceiver_ar", {"latents": 32, **WITHIN}),
    ("perceiver_ar", {"latents": 32, "cross_attend_after": (0,), "positions": "sinusoidal", **WITHIN}),
    ("megabyte", WITHIN),
    ("megabyte", {"positions": "rotary", "patch_size": 8, **WITHIN}),
    ("megabyte", {"patch_encoder": "convolution", **WITHIN}),
    ("megabyte", {"cross_patch_bytes": 4, **WITHIN}),
    ("megabyte", {"cross_patch_bytes": 1, "patch_encoder": "convolution", "positions": "rotary", **WITHIN}),
    ("transformer_xl", {"memory_length": 0}),
]
"""Models in which a byte depends on every earlier byte of its document."""
T = 32
SEPARATORS = ((0, 7, 8, 15, 22), (3, 4, 5, 6, 17, 31))
"""Places of separators: at ends and beginnings of patches of 4 and 8 bytes, within them, and next to each other."""


def documents_before(ids: Tensor) -> Tensor:
    """Return (T,) the number of separators before each id of a row, which numbers its document."""
    ends = (ids == SEPARATOR).long()
    return ends.cumsum(0) - ends


@pytest.mark.slow
@pytest.mark.parametrize("separators", SEPARATORS, ids=str)
@pytest.mark.parametrize(("name", "changes"), ALL_SEEN, ids=str)
def test_score_depends_on_exactly_the_earlier_bytes_of_its_document(
    name: str, changes: dict[str, Any], separators: tuple[int, ...]
):
    """Row s of the second batch has another byte at place s. Rows with the same bytes have equal scores, to the bit.

    A dependence may be too small for fp32, so two draws of the bytes are tried.
    """
    subject = Subject.of(name, sequence_length=T, **changes)
    model = subject.build(torch.float64)
    differs = torch.zeros(T, T, dtype=torch.bool)
    for seed in (0, 1):
        ids = (subject.ids(1, seed=seed) % SEPARATOR).repeat(T, 1)
        ids[:, list(separators)] = SEPARATOR
        other = ids.clone()
        other.diagonal().copy_((ids.diagonal() + 1) % 256)
        with torch.no_grad():
            differs |= model(ids) != model(other)
    documents, places = documents_before(ids[0]), torch.arange(T)
    seen = (documents[:, None] == documents) & (places[:, None] <= places)
    are_bytes = ids[0] != SEPARATOR
    assert torch.equal(differs[are_bytes], seen[are_bytes])


def test_document_that_begins_within_a_patch_has_the_conditioning_of_the_first_patch():
    """Its first position reads the separator and position 0 reads the pad; only the local model distinguishes them."""
    model = Subject.of("megabyte", sequence_length=T, **WITHIN).build()
    assert isinstance(model, Megabyte)
    ids = torch.arange(T)[None]
    ids[0, 9] = SEPARATOR  # in patch 2, bytes 8 to 11
    taken: list[Tensor] = []
    model.local_stack.register_forward_pre_hook(lambda _, arguments: taken.append(arguments[0]))
    with torch.no_grad():
        model(ids)
        first = model.condition(model.global_stack(model.global_pad.expand(1, 1, -1))[0])[0]
    expected = first[2:] + model.local_embedding(ids[0, 9:11])
    torch.testing.assert_close(taken[0][2, 2:], expected)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [0, 3, 20])
def test_perceiver_ar_decoder_equals_the_forward_pass_after_it_recomputes_its_latents(prefix: int):
    subject = Subject.of("perceiver_ar", sequence_length=T, latents=6, **WITHIN)
    model, ids = subject.build(torch.float64), subject.short_documents(3)
    assert isinstance(model, PerceiverAR)
    decoder = model.decoder(3)
    with torch.no_grad():
        logits = decoder.prime(ids[:, :prefix])
        for t in range(prefix, T):
            model.latents = decoder.latents
            places = model.place_latents(torch.full((3,), t + 1), t + 1)
            expected = model.logits(model.read(ids[:, : t + 1], places))[:, -1]
            model.latents = 6
            torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)
            if t + 1 < T:
                logits = decoder.step(ids[:, t])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["megabyte", "perceiver_ar"])
def test_activation_checkpointing_changes_no_bit(name: str, tmp_path: Path):
    check_activation_checkpointing(Subject.of(name, **WITHIN), tmp_path)


@pytest.mark.parametrize(("length", "window"), [(1, 1), (5, 2), (12, 4), (13, 4), (7, 7), (5, 9)])
def test_a_window_within_documents_is_dense_attention_under_both_masks(length: int, window: int):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, length, 4, dtype=torch.double)
    documents = (torch.rand(2, length) < 0.3).cumsum(1)
    age = torch.arange(length)[:, None] - torch.arange(length)
    dense = ((age >= 0) & (age < window)) & (documents[:, None, :, None] == documents[:, None, None])
    first = torch.zeros(2, dtype=torch.long)
    fits = length <= window
    visible = (
        visible_in_documents(documents, documents, first, in_blocks=False)
        if fits
        else visible_in_window(documents, window)
    )
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(~dense, -torch.inf)
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(window_attention(q, k, v, window, 0.0, visible), expected, atol=1e-12, rtol=0)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(0, 300),
    st.integers(0, 300),
    st.sampled_from([0.0, 0.01, 0.2]),
    st.integers(0, 2**64 - 1),
)
def test_block_mask_equals_the_dense_mask(queries: int, first: int, before: int, share: float, seed: int):
    """Full and partial blocks equal those that torch finds by checking every pair."""
    torch.manual_seed(seed)
    begins = torch.tensor([first, before])
    keys = queries + int(begins.max())
    of_keys = (torch.rand(2, keys) < share).cumsum(1)
    of_queries = of_keys.gather(1, begins[:, None] + torch.arange(queries))
    blocks = visible_in_documents(of_queries, of_keys, begins, in_blocks=True)
    dense = visible_in_documents(of_queries, of_keys, begins, in_blocks=False)
    assert isinstance(blocks, BlockMask)
    assert isinstance(dense, Tensor)
    assert torch.equal(create_mask(blocks.mask_mod, 2, None, queries, keys, device="cpu"), dense)
    found = create_block_mask(blocks.mask_mod, 2, None, queries, keys, device="cpu")
    assert torch.equal(blocks.to_dense(), found.to_dense())
    assert torch.equal(blocks.full_kv_num_blocks, found.full_kv_num_blocks)
    assert torch.equal(blocks.kv_num_blocks, found.kv_num_blocks)


@pytest.mark.parametrize(("length", "patch", "reach"), [(1024, 8, 8), (1024, 8, 0), (1000, 12, 5), (300, 3, 1)])
def test_block_mask_of_patches_equals_the_one_that_torch_finds(length: int, patch: int, reach: int):
    one_document = torch.zeros(1, length, dtype=torch.long)
    blocks = visible_in_patches(one_document, patch, reach, across_documents=True)
    found = create_block_mask(blocks.mask_mod, 1, None, length, length, device="cpu")
    assert torch.equal(blocks.to_dense(), found.to_dense())
    assert blocks.kv_num_blocks.max() <= 2


def test_cpu_uses_a_boolean_mask_and_the_estimate_assumes_the_block_mask_of_a_gpu():
    def takes(device: str, channels: int = 64, keys: int = FEWEST_BLOCK_KEYS, dropout: float = 0.0) -> bool:
        return takes_blocks(torch.empty(0, device=device, dtype=torch.bfloat16), channels, keys, dropout)

    assert takes("meta")
    assert not takes("cpu")
    assert not takes("meta", dropout=0.1)
    assert not takes("meta", channels=8)
    assert not takes("meta", keys=FEWEST_BLOCK_KEYS - 1)
    assert not takes_blocks(torch.empty(0, device="meta", dtype=torch.float64), 64, FEWEST_BLOCK_KEYS, 0.0)


@pytest.mark.parametrize(("dropout", "has_mask"), [(0.0, False), (0.1, True)])
def test_the_estimate_counts_a_mask_of_all_pairs_only_with_dropout(dropout: float, has_mask: bool):
    length, rows = 512, 2
    kept = [
        measure_activations(
            Subject.of(
                "transformer",
                sequence_length=length,
                window=None,
                dropout=dropout,
                attention_across_documents=across,
            ).config,
            rows,
            torch.bfloat16,
        ).kept
        for across in (True, False)
    ]
    pairs = rows * length * length
    # Booleans, and numbers in bf16 that each of the two layers keeps.
    assert kept[1] - kept[0] >= 4 * pairs if has_mask else kept[1] - kept[0] < pairs // 8


@pytest.mark.parametrize("across", [True, False])
def test_evaluation_and_generation_use_the_option_of_the_training(across: bool, tmp_path: Path):
    subject = Subject.of("megabyte", attention_across_documents=across)
    engine = build(subject)
    train(engine, subject, range(1))
    state = {
        "counters": engine.counters(),
        "config": {"model": subject.config.model_dump(mode="json"), "engine": {"precision": "fp32"}, "data": {}},
    }
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, engine.owned_fragments(), state)
    model = load_model(str(store.committed()[-1]), "cpu", None, {}).module
    assert model.attends_across_documents == across
    ids = subject.short_documents(2)
    with torch.no_grad():
        assert torch.equal(model(ids), engine.model.eval()(ids))
