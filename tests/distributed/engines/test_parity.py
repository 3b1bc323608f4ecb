"""Every engine on any number of ranks has the losses of one process for the same recipe, seed and bytes.

`make test` trains every engine on every number of ranks and in every precision, each with some of the families, and
every family with some of the engines. `make test-long` trains every engine with every family.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest

from tests.distributed.parity import FAMILIES, build, checkpointing_of_all, losses, losses_of_all
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.timeout(1500)  # one start of ranks serves many cases
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
"""Engines by number of ranks; 3 does not divide the 4 micro-batches of a batch."""
SOME = {
    (2, "fp32"): {
        "ddp": "transformer",
        "fsdp": "perceiver_ar",
        "fsdp offloaded": "megabyte",
        "zero1": "transformer_xl",
        "zero2": "encoder_decoder",
        "zero3": "encoder",
    },
    (3, "fp32"): {
        "ddp": "megabyte",
        "fsdp": "transformer_xl",
        "zero3": "perceiver_ar",
        "zero3 checkpointed": "blt",
    },
    (4, "fp32"): {"fsdp": "mamba", "hsdp": "hnet"},
    (2, "bf16"): {
        "ddp": "transformer_xl",
        "fsdp": "megabyte",
        "fsdp offloaded": "perceiver_ar",
        "zero1": "mamba",
        "zero2": "spacebyte",
        "zero3": "perceiver_io",
    },
}
"""Family of each engine in `make test`, by number of ranks and precision."""
STEPS = {"fp32": 7, "bf16": 4}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}
"""Relative tolerance. The order of sums differs; in bf16, gradients are also rounded after other sums."""

Case = tuple[str, str]
"""Family and engine."""


def some(ranks: int, precision: str) -> list[Case]:
    return [(family, engine) for engine, family in SOME[ranks, precision].items()]


def every(ranks: int, precision: str) -> list[Case]:
    return list(itertools.product(FAMILIES, ENGINES[ranks]))


@cache
def alone(family: str, precision: str) -> list[float]:
    return losses(build(family, precision=precision), range(STEPS[precision]), family=family)


@pytest.mark.parametrize("cases_of", [some, pytest.param(every, marks=pytest.mark.long)])
@pytest.mark.parametrize(("ranks", "precision"), SOME)
def test_losses_equal_those_of_one_process(ranks: int, precision: str, cases_of: Any):
    cases = cases_of(ranks, precision)
    engines = {name: engine | {"precision": precision} for name, engine in ENGINES[ranks].items()}
    for rank_losses in on_ranks(ranks, losses_of_all, engines, cases, STEPS[precision], "adamw"):
        for family, name in cases:
            expected = pytest.approx(alone(family, precision), rel=TOLERANCE[precision])
            assert rank_losses[family, name] == expected, (family, name)


@pytest.mark.slow
def test_muon_has_the_losses_of_one_process_also_where_ranks_hold_rows_of_matrices():
    engines = {**ENGINES[4], "fsdp offloaded": ENGINES[2]["fsdp offloaded"]}
    cases = [("megabyte", name) for name in engines]
    expected = pytest.approx(losses(build("megabyte", optimizer="muon"), range(4)), rel=TOLERANCE["fp32"])
    for rank_losses in on_ranks(4, losses_of_all, engines, cases, 4, "muon"):
        for case in cases:
            assert rank_losses[case] == expected, case


@pytest.mark.slow
def test_rate_multipliers_and_exceptions_from_decay_have_the_losses_of_one_process():
    fields: dict[str, Any] = {"precision": "fp32", "has_multipliers": True}
    engines = {name: engine | fields for name, engine in ENGINES[2].items()}
    cases = [("transformer", name) for name in engines]
    steps = range(STEPS["fp32"])
    expected = losses(build("transformer", has_multipliers=True), steps)
    assert expected[-1] != pytest.approx(alone("transformer", "fp32")[-1], rel=1e-3)
    for rank_losses in on_ranks(2, losses_of_all, engines, cases, len(steps), "adamw"):
        for case in cases:
            assert rank_losses[case] == pytest.approx(expected, rel=TOLERANCE["fp32"]), case


def test_every_engine_and_every_family_train_in_short_tests():
    for (ranks, precision), families in SOME.items():
        assert families.keys() == ENGINES[ranks].keys(), precision
    assert {family for families in SOME.values() for family in families.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    "families_by_precision",
    [
        {"fp32": ("perceiver_ar",), "bf16": ("megabyte",)},
        pytest.param({"fp32": FAMILIES, "bf16": FAMILIES}, marks=pytest.mark.long),
    ],
    ids=["some", "every"],
)
def test_activation_checkpointing_changes_no_bit_under_fsdp(families_by_precision: Mapping[str, Sequence[str]]):
    modes = ("none", "full", "selective")
    for results in on_ranks(2, checkpointing_of_all, modes, families_by_precision):
        for (family, precision), (plain, *checkpointed) in results.items():
            assert all(each == plain for each in checkpointed), (family, precision)
