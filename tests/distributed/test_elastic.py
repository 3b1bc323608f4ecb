"""A run resumes with its whole state under another engine and on another number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import CheckpointStore, read_metadata
from tests.conftest import recipe_tree
from tests.distributed.starts import train

STACK = {"width": 32, "layers": 2, "heads": 2}
LATER = [(7, 1, {"name": "ddp", "context": 1}), (12, 2, {"name": "zero2", "context": 1})]
"""Last step, ranks and engine of each start but the first in `make test-long`; `make test` leaves the first one out."""


def with_memory(tree: Any, corpus: Path) -> None:
    """Set a Transformer-XL with dropout, whose memory is forgotten at an end of epoch within the run."""
    tree["model"] = {"family": "transformer_xl", "sequence_length": 128, "memory_length": 48, "dropout": 0.1} | STACK
    tree["data"] = {"shards": str(corpus / "validation"), "lanes": 40}
    tree["train"] |= {"global_batch": 40, "micro_batch": 12}


def mixed(tree: Any, corpus: Path) -> None:
    """Set two sources whose weights change within the run, with random crops and dropout."""
    latents = {"latents": 32, "latent_model": STACK, "cross_heads": 2, "cross_attend_dropout": 0.3, "dropout": 0.1}
    tree["model"] = {"family": "perceiver_ar", "sequence_length": 128} | latents
    sources = {"books": {"shards": str(corpus / "train"), "weight": 3}, "code": {"shards": str(corpus / "validation")}}
    sources["code"]["packing"] = "document"
    tree["data"] = {"mixture": sources, "lanes": 8, "stages": [{"step": 6, "weights": {"code": 5}}]}
    tree["train"] |= {"global_batch": 7, "micro_batch": 2}


def finished(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the journal, and the state of the last checkpoint."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return records, read_metadata(CheckpointStore(run / "checkpoints", keep=1).committed()[-1]).state


@pytest.mark.parametrize("later", [LATER[1:], pytest.param(LATER, marks=pytest.mark.long)], ids=["two", "three"])
@pytest.mark.parametrize(
    ("recipe", "first"),
    [(with_memory, (4, 3, {"name": "fsdp"})), (mixed, (4, 4, {"name": "fsdp", "context": 2}))],
    ids=["memory", "mixture, context"],
)
def test_run_resumes_under_another_engine_and_number_of_ranks(
    recipe: Any, first: Any, later: Any, corpus_folder: Path, tmp_path: Path
):
    tree: Any = recipe_tree(corpus_folder)
    recipe(tree, corpus_folder)
    tree["optimizer"]["schedule"] = {"shape": "constant", "warmup_steps": 3}
    tree["validation"] = {"shards": None}
    tree["run"] = {"root": str(tmp_path), "name": "moved"}
    for steps, ranks, engine in [first, *later]:
        tree["train"]["steps"] = steps
        tree["engine"] |= engine
        train(tree, tmp_path, ranks)
    tree["run"]["name"] = "alone"
    tree["engine"]["name"] = "ddp"
    train(tree, tmp_path)
    (moved, state), (alone, expected) = (finished(tmp_path / name) for name in ("moved", "alone"))
    assert [record["step"] for record in moved] == list(range(1, 13))
    assert state["reading"] == expected["reading"]
    assert state["counters"] == expected["counters"]
    exact = [name for name in alone[0] if name.startswith("epoch") or name in ("learning_rate", "masked_bytes")]
    losses = [name for name in alone[-1] if name.startswith("train/")]
    assert len(losses) == (3 if "mixture" in tree["data"] else 1)
    for own, other in zip(moved, alone, strict=True):
        assert [own[name] for name in losses] == pytest.approx([other[name] for name in losses], rel=1e-5)
        assert own["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
        assert {name: own[name] for name in exact} == {name: other[name] for name in exact}
