"""Ranks that share rows (context parallelism) train as one process does, dropout included."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from pretrain.distributed.context import Context
from pretrain.distributed.world import ALONE, World
from tests.distributed.parity import build, losses
from tests.distributed.ranks import on_ranks

pytestmark = pytest.mark.timeout(900)  # one start of ranks serves all cases
RANKS, STEPS = 4, 5
WITHIN_DOCUMENTS = {"attention_across_documents": False}


class Case(NamedTuple):
    """Training by four ranks."""

    family: str
    model: dict[str, Any]
    """Changes of the family's small model."""
    engine: dict[str, Any]


MEGABYTE = {"patch_encoder": "convolution", "cross_patch_bytes": 3, "positions": "rotary"}
CASES = {
    "megabyte, dropout, ddp": Case("megabyte", {}, {"name": "ddp", "context": 2}),
    "megabyte, halos, fsdp": Case("megabyte", MEGABYTE, {"name": "fsdp", "context": 4}),
    "megabyte, documents, hsdp": Case(
        "megabyte", MEGABYTE | WITHIN_DOCUMENTS, {"name": "hsdp", "shards": 2, "context": 4}
    ),
    "megabyte, ring": Case("megabyte", {"dropout": 0.0}, {"name": "ddp", "context": 4}),
    "megabyte, ring, recomputed": Case(
        "megabyte", MEGABYTE | {"dropout": 0.0}, {"name": "fsdp", "context": 2, "activation_checkpointing": "full"}
    ),
    "megabyte, ring, products kept": Case(
        "megabyte", {"dropout": 0.0}, {"name": "ddp", "context": 4, "activation_checkpointing": "selective"}
    ),
    "transformer, window, dropout": Case("transformer", {}, {"name": "fsdp", "context": 4}),
    "transformer, window, documents": Case(
        "transformer", WITHIN_DOCUMENTS | {"positions": "learned"}, {"name": "ddp", "context": 2}
    ),
    "transformer, window, no dropout": Case("transformer", {"dropout": 0.0}, {"name": "ddp", "context": 4}),
    "transformer, all, documents": Case("transformer", {"window": None} | WITHIN_DOCUMENTS, {"context": 4}),
    "transformer, ring": Case(
        "transformer", {"window": None, "dropout": 0.0}, {"name": "hsdp", "shards": 2, "context": 2}
    ),
    "perceiver_ar, dropped inputs": Case("perceiver_ar", {}, {"name": "hsdp", "shards": 2, "context": 4}),
    "perceiver_ar, documents": Case(
        "perceiver_ar", WITHIN_DOCUMENTS | {"positions": "sinusoidal", "cross_attend_after": [0]}, {"context": 2}
    ),
    "perceiver_ar, ring": Case(
        "perceiver_ar", {"dropout": 0.0, "cross_attend_dropout": 0.0}, {"name": "fsdp", "context": 4}
    ),
}


@pytest.mark.parametrize("patches", [None, 8])
def test_dropout_keeps_the_mask_of_this_rank_only(patches: int | None):
    x = torch.ones(4, 6, 5, requires_grad=True)
    dropped: Any = Context(index=1, size=4, patches=patches).dropout(x, 0.5).grad_fn
    assert dropped._saved_other.untyped_storage().nbytes() == x.nbytes


def numbers(case: Case, world: World = ALONE, **engine: Any) -> tuple[list[float], list[list[float]]]:
    """Return the losses of the steps of a case, and then the nats of three rows that are shorter than the model's."""
    engine = {"name": "ddp"} | engine
    built = build(case.family, world, changes=case.model, **engine)
    step_losses = losses(built, range(STEPS), world, engine.get("context", 1))
    ids = np.random.default_rng(0).integers(250, 257, (3, 21)).astype(np.int16)
    return step_losses, built.nats(ids).tolist()


def numbers_of_all(world: World) -> dict[str, Any]:
    return {name: numbers(case, world, **case.engine) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return on_ranks(RANKS, numbers_of_all)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_numbers_equal_those_of_one_process(name: str, by_rank: list[dict[str, Any]]):
    expected, expected_nats = numbers(CASES[name])
    for of_rank in by_rank:
        step_losses, nats = of_rank[name]
        assert step_losses == pytest.approx(expected, rel=1e-5)
        assert np.allclose(nats, expected_nats, rtol=1e-4, atol=1e-5)
