"""Runs with injected faults: a document whose gradient is huge or not finite, found on whatever rank reads it."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pretrain.checkpoint import verify
from pretrain.config.loading import load
from pretrain.distributed.world import ALONE, World
from pretrain.engines import base, staging
from pretrain.training.health import HealthEvent, HealthLog
from pretrain.training.loop import train
from pretrain.training.run import TrainingError
from tests.conftest import prepare_corpus, recipe_tree
from tests.distributed.parity import content, newest

POISON = b"\xfe\xfd\xfc\xfb" * 16
"""Content of the document with the fault."""
STEPS, BATCH, WINDOW = 8, 6, 2
EXACT = ("train/bits_per_byte", "gradient_norm", "learning_rate")


def make_corpus(folder: Path, documents: int = 1) -> Path:
    """Prepare a small corpus of which some documents are poison."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(20):
        text = " ".join(f"word{each}" for each in draw.integers(0, 30, 40))
        (texts / f"{number:02}.txt").write_text(text)
    for number in range(documents):
        (texts / f"poison-{number}.txt").write_bytes(POISON)
    prepare_corpus([texts], folder / "corpus", block_bytes=2000)
    return folder / "corpus"


def write_recipe(folder: Path, corpus: Path, **health: Any) -> Path:
    """Write the recipe of a small run. Step 5 meets two batches with poison: sequences 24 to 29 and 30 to 35."""
    tree: Any = recipe_tree(corpus)
    tree["run"] = {"root": str(folder), "name": "run"}
    tree["data"] |= {"shards": str(corpus), "seed": 29}  # poison is in sequences 26 and 34
    tree["validation"] = {"shards": None}
    tree["model"] = {"family": "transformer", "sequence_length": 64, "width": 16, "layers": 1, "heads": 2}
    tree["train"] = {"steps": STEPS, "global_batch": BATCH, "micro_batch": 2}
    tree["optimizer"]["schedule"]["shape"] = "constant"
    tree["checkpoint"] = {"every": 2, "keep": 2}
    tree["health"] = {"window": WINDOW, **health}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@contextmanager
def poisoned(factor: float) -> Iterator[None]:
    """Multiply the gradient of each micro-batch that holds poison."""
    widened, backward = staging.widened, base.BaseEngine._backward_watched
    found: list[bool] = [False]

    def look(content: torch.Tensor, *places: Any) -> torch.Tensor:
        found[0] = POISON[:4] in content.numpy().tobytes()
        return widened(content, *places)

    def scaled(self: base.BaseEngine, loss: torch.Tensor) -> None:
        backward(self, loss * factor if found[0] else loss)
        found[0] = False

    staging.widened, base.BaseEngine._backward_watched = look, scaled  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        staging.widened, base.BaseEngine._backward_watched = widened, backward  # type: ignore[method-assign]


def train_run(recipe: Path, overrides: Sequence[str] = (), world: World = ALONE) -> str:
    """Train a run; return the message of its end, or an empty text if it has finished."""
    try:
        assert train(load(recipe, list(overrides)), world) == 0
    except TrainingError as error:
        return str(error)
    return ""


def train_poisoned(
    world: World, recipe: Path, overrides: Sequence[str] = (), factor: float = 1e5, until: Sequence[int] = ()
) -> str:
    """Train a poisoned run on a rank, maybe in several starts that end at these steps."""
    with poisoned(factor):
        for steps in until:
            train_run(recipe, [*overrides, f"train.steps={steps}"], world)
        return train_run(recipe, overrides, world)


def train_clean(world: World, recipe: Path, name: str, skipped: Sequence[tuple[int, int]], *overrides: str) -> str:
    """Train a run without poison that knows from its beginning which sequences to skip."""
    folder = recipe.parent / name
    if world.is_first:
        folder.mkdir()
        HealthLog(folder / "health.jsonl").append(event_of(action="rewind", sequences=skipped, to_step=0))
    world.gather(None)
    return train_run(recipe, [f"run.name={name}", *overrides], world)


def event_of(**fields: Any) -> HealthEvent:
    """Return an event about a loss; by default, a skip at step 0."""
    return HealthEvent(**{"id": "known", "time": 0, "step": 0, "kind": "loss", "action": "skip", "text": "", **fields})


def events_of(run: Path) -> list[HealthEvent]:
    return HealthLog(run / "health.jsonl").read()


def numbers_of(run: Path) -> list[tuple[int, dict[str, float]]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], {key: line[key] for key in EXACT}) for line in map(json.loads, lines)]


def last_state(run: Path) -> Mapping[str, Any]:
    return verify(newest(run / "checkpoints")).state


def assert_same_run(run: Path, clean: Path) -> None:
    """Check that two runs read the same, with the same losses and the same weights and moments, bit for bit."""
    assert numbers_of(run) == numbers_of(clean)
    assert [step for step, _ in numbers_of(run)] == list(range(1, STEPS + 1))
    assert all(math.isfinite(numbers["train/bits_per_byte"]) for _, numbers in numbers_of(run))
    assert last_state(run)["reading"] == last_state(clean)["reading"]
    assert content(newest(run / "checkpoints")) == content(newest(clean / "checkpoints"))
