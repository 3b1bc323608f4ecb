"""Patches as metrics of a step: sums over rows, whatever passes and stages they come from."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.vocabulary import PADDING
from pretrain.estimate.patches import patch_costs
from pretrain.models import build_model, small_config
from pretrain.models.patching.patcher import Decision, Patcher, PatchState
from pretrain.models.patching.ratio import ratio_loss
from pretrain.models.patching.watching import PatchCounts

T = 8
texts = st.lists(st.text("ab .", min_size=1, max_size=T), min_size=1, max_size=4)


class Drawn(Patcher):
    """Rule whose hidden states are its probabilities."""

    target_ratio = 3.0

    def rule(self, read: Tensor, state: PatchState, hidden: Tensor | None) -> Decision:
        assert hidden is not None
        return Decision(hidden[..., 0] > 0.5, hidden[..., 0])


def rows_of(texts: Sequence[str]) -> Tensor:
    """Return rows of T ids, padded at their ends."""
    ids = torch.full((len(texts), T), PADDING)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text.encode()))
    return ids


def probabilities(shape: Sequence[int], seed: int) -> Tensor:
    """Return probabilities of a start; a row begins with 1."""
    p = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p[:, 0] = 1
    return p


def numbers_of(passes: Sequence[tuple[Tensor, Sequence[Tensor]]], capacities: Sequence[int]) -> dict[str, float]:
    """Return the metrics of passes: ids and the probabilities of each stage."""
    patchers = {str(stage): Drawn(capacity) for stage, capacity in enumerate(capacities)}
    counts = PatchCounts(patchers, torch.device("cpu"))
    with counts.watching():
        for ids, by_stage in passes:
            for patcher, p in zip(patchers.values(), by_stage, strict=True):
                patcher(torch.zeros(p.shape, dtype=torch.long), hidden=p[..., None])
            counts.add(ids, ids != PADDING)
    return counts.numbers([counts.sums().tolist()])


@settings(max_examples=20)
@given(texts, st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_metrics_are_those_of_counting_by_hand(texts: list[str], outer: int, inner: int, seed: int):
    ids = rows_of(texts)
    p = [probabilities(ids.shape, seed), probabilities((len(ids), min(outer, T)), seed + 1)]
    numbers = numbers_of([(ids, p)], [outer, inner])
    places = [list(range(len(text))) for text in texts]  # byte at which each position of the stage begins
    total = sum(map(len, texts))
    for stage, capacity in enumerate([outer, inner]):
        wanted = [[i for i in range(len(row)) if p[stage][r, i] > 0.5] for r, row in enumerate(places)]
        late = sum(
            len(text) - places[r][own[capacity]]
            for r, (text, own) in enumerate(zip(texts, wanted, strict=True))
            if len(own) > capacity
        )
        kept = [[row[i] for i in own[:capacity]] for row, own in zip(places, wanted, strict=True)]
        positions = sum(map(len, places))
        drawn = [p[stage][r, i].item() for r, row in enumerate(places) for i in range(len(row))]
        expected = {
            "bytes_per_patch": total / sum(map(len, kept)),
            "capacity_used": sum(map(len, kept)) / (len(texts) * min(capacity, p[stage].shape[1])),
            "overflow_rows": sum(len(own) > capacity for own in wanted) / len(texts),
            "overflow_bytes": late / total,
            "router_starts": sum(map(len, wanted)) / positions,
            "router_probability": sum(drawn) / positions,
            "router_confidence": sum(abs(each - 0.5) for each in drawn) / positions,
        }
        assert {name: numbers[f"patches/{stage}/{name}"] for name in expected} == pytest.approx(expected), stage
        places = kept
    assert numbers["patches/1/positions_per_patch"] == pytest.approx(
        numbers["patches/1/bytes_per_patch"] / numbers["patches/0/bytes_per_patch"]
    )


@settings(max_examples=10)
@given(texts, texts, st.integers(0, 99))
def test_passes_add_up(first: list[str], second: list[str], seed: int):
    ids = rows_of(first + second)
    p = probabilities(ids.shape, seed)
    cut = len(first)
    apart = numbers_of([(ids[:cut], [p[:cut]]), (ids[cut:], [p[cut:]])], [3])
    assert apart == pytest.approx(numbers_of([(ids, [p])], [3]))


def test_ratio_loss_at_its_known_values():
    """Section 4.1 of the H-Net paper's loss, rearranged: 1 + (NF-1)(NG-1)/(N-1)."""
    n = 6.0
    at = [(1 / n, 0.9), (0.7, 1 / n), (1.0, 1.0), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0)]
    found = [ratio_loss(torch.tensor(f), torch.tensor(g), n).item() for f, g in at]
    assert found == pytest.approx([1, 1, n, n / (n - 1), 0, 0], abs=1e-6)


def test_costs_fall_with_the_size_of_patches_from_that_of_the_capacity_on():
    model = build_model(small_config("hnet"))
    costs = patch_costs(model, [1.0, 8.0, 16.0, 1e9])
    assert costs[0].flops == pytest.approx(model.flops(model.sequence_length))
    assert [cost.bytes_per_patch for cost in costs] == [model.sequence_length / 20, 8, 16]
    assert all(later.flops < earlier.flops for earlier, later in pairwise(costs))
