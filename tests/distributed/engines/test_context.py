"""Ranks that share rows (context parallelism) train as one process does, dropout included."""

from functools import partialmethod
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

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

COMPILED = {
    "perceiver_ar, dropped inputs, compiled": Case("perceiver_ar", {}, {"context": 2, "compile": True}),
    "perceiver_ar, ring, compiled": Case(
        "perceiver_ar", {"dropout": 0.0, "cross_attend_dropout": 0.0}, {"name": "fsdp", "context": 2, "compile": True}
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
    """Return the numbers of all cases. Compiled blocks are traced and differentiated, and run without machine code."""
    with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager")):
        return {name: numbers(case, world, **case.engine) for name, case in (CASES | COMPILED).items()}


def numbers_of_compiled(world: World) -> dict[str, Any]:
    return {name: numbers(case, world, **case.engine) for name, case in COMPILED.items()}


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return on_ranks(RANKS, numbers_of_all)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES | COMPILED)
def test_numbers_equal_those_of_one_process(name: str, by_rank: list[dict[str, Any]]):
    check(name, by_rank)


@pytest.mark.long
def test_compiled_numbers_equal_those_of_one_process():
    by_rank = on_ranks(2, numbers_of_compiled)
    for name in COMPILED:
        check(name, by_rank)


def check(name: str, by_rank: list[dict[str, Any]]) -> None:
    """Check that the numbers of a case on each rank are those of one process."""
    expected, expected_nats = numbers((CASES | COMPILED)[name])
    for of_rank in by_rank:
        step_losses, nats = of_rank[name]
        assert step_losses == pytest.approx(expected, rel=1e-5)
        assert np.allclose(nats, expected_nats, rtol=1e-4, atol=1e-5)
