"""Every engine on any number of ranks trains as one process does: same recipe, seed and bytes, same losses."""

from functools import cache
from typing import Any

import pytest

from tests.distributed.parity import FAMILIES, build, checkpointing_of_all, losses, losses_of_all
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.timeout(1500)  # a start of ranks serves many cases
ENGINES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ddp": {"name": "ddp"},
        "fsdp": {"name": "fsdp"},
        "fsdp offloaded": {"name": "fsdp", "offload": True},
        "zero1": {"name": "zero1"},
        "zero2": {"name": "zero2"},
        "zero3": {"name": "zero3"},
    },
    3: {
        "ddp": {"name": "ddp"},
        "fsdp": {"name": "fsdp", "reshard_after_forward": False},
        "zero3": {"name": "zero3"},
        "zero3 checkpointed": {"name": "zero3", "activation_checkpointing": "full"},
    },
    4: {"fsdp": {"name": "fsdp"}, "hsdp": {"name": "hsdp", "shards": 2}},
}
"""By number of ranks; 3 does not divide the 4 micro-batches of a batch."""
FAMILIES_OF = {2: tuple(FAMILIES), 3: ("megabyte", "transformer_xl"), 4: tuple(FAMILIES)}
"""Three ranks are told apart by how micro-batches are dealt, of which a memory makes the most."""
STEPS = {"fp32": 30, "bf16": 8}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
"""Relative. Sums are taken in another order; in bf16, gradients are also rounded after other sums."""


@cache
def alone(family: str, precision: str) -> list[float]:
    return losses(build(family, precision=precision), range(STEPS[precision]))


@pytest.fixture(scope="module", params=[*((ranks, "fp32") for ranks in ENGINES), (2, "bf16")], ids=str)
def together(request: pytest.FixtureRequest) -> tuple[int, str, list[dict[str, list[float]]]]:
    """Number of ranks, precision, and the losses of all engines and families on each rank."""
    ranks, precision = request.param
    cases = {name: engine | {"precision": precision} for name, engine in ENGINES[ranks].items()}
    return ranks, precision, on_ranks(ranks, losses_of_all, cases, FAMILIES_OF[ranks], STEPS[precision])


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_one_process(together: tuple[int, str, list[dict[str, list[float]]]], family: str):
    ranks, precision, of_ranks = together
    if family not in FAMILIES_OF[ranks]:
        pytest.skip(f"{family} trains on other numbers of ranks")
    expected = alone(family, precision)
    for of_rank in of_ranks:
        for engine in ENGINES[ranks]:
            assert of_rank[f"{family} {engine}"] == pytest.approx(expected, rel=TOLERANCE[precision]), engine


@pytest.mark.parametrize("precision", TOLERANCE)
def test_activation_checkpointing_changes_no_bit_under_fsdp(precision: str):
    modes = ("none", "full", "selective")
    for of_rank in on_ranks(2, checkpointing_of_all, modes, precision):
        for family in FAMILIES:
            plain, *others = (of_rank[f"{family} {mode}"] for mode in modes)
            assert all(other == plain for other in others), family
