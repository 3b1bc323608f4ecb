"""A run that is started again under another engine, on another number of ranks, goes on with all that it had."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import CheckpointStore, read_metadata
from tests.conftest import recipe_tree
from tests.distributed.starts import train

STACK = {"width": 32, "layers": 2, "heads": 2}
STARTS = [(4, 3, {"name": "fsdp"}), (7, 1, {"name": "ddp"}), (12, 2, {"name": "zero2"})]
"""Last step, ranks and engine of each."""


def with_memory(tree: Any, corpus: Path) -> None:
    """A Transformer-XL's, in each row; with dropout. The epoch, at whose end it is forgotten, ends on the way."""
    tree["model"] = {"family": "transformer_xl", "sequence_length": 128, "memory_length": 48, "dropout": 0.1} | STACK
    tree["data"] = {"shards": str(corpus / "validation"), "lanes": 40}
    tree["train"] |= {"global_batch": 40, "micro_batch": 12}


def mixed(tree: Any, corpus: Path) -> None:
    """Two sources whose weights change on the way, with crops and dropout that are drawn."""
    latents = {"latents": 32, "latent_model": STACK, "cross_heads": 2, "cross_attend_dropout": 0.3, "dropout": 0.1}
    tree["model"] = {"family": "perceiver_ar", "sequence_length": 128} | latents
    sources = {"books": {"shards": str(corpus / "train"), "weight": 3}, "code": {"shards": str(corpus / "validation")}}
    sources["code"]["packing"] = "document"
    tree["data"] = {"mixture": sources, "lanes": 8, "stages": [{"step": 6, "weights": {"code": 5}}]}
    tree["train"] |= {"global_batch": 7, "micro_batch": 2}


def finished(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The journal, and the state of the last checkpoint."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return records, read_metadata(CheckpointStore(run / "checkpoints", keep=1).committed()[-1]).state


@pytest.mark.parametrize("recipe", [with_memory, mixed])
def test_whatever_trains_it_a_run_goes_on(recipe: Any, corpus_folder: Path, tmp_path: Path):
    tree: Any = recipe_tree(corpus_folder)
    recipe(tree, corpus_folder)
    tree["optimizer"]["schedule"] = {"shape": "constant", "warmup_steps": 3}
    tree["validation"] = {"shards": None}
    tree["run"] = {"root": str(tmp_path), "name": "moved"}
    for steps, ranks, engine in STARTS:
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
    for own, other in zip(moved, alone, strict=True):
        assert own["train/bits_per_byte"] == pytest.approx(other["train/bits_per_byte"], rel=1e-5)
        assert own["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
        assert {name: own[name] for name in exact} == {name: other[name] for name in exact}
