"""Ranks whose rows have one patch, as many as possible or nothing but padding train as one process does.

                rank 0                                        rank 1
    step 0      one patch; padding; most patches              random rows
    step 1      random rows                                   one patch; padding; most patches
    step 2      padding alone                                 random rows

Shapes and collectives do not depend on the data of a rank, so no rank waits for another one and no gradient is missing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Example
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.conformance.engines import load, save
from pretrain.distributed.world import ALONE, World
from pretrain.models import build_model, small_config
from pretrain.optim.groups import MULTIPLIER
from pretrain.training.weights.exports import write_export
from tests.distributed.parity import MICRO_BATCH, ROWS, T, build
from tests.distributed.ranks import on_ranks
from tests.pretrain.models.rows import rows_of

pytestmark = pytest.mark.timeout(1500)  # one start of ranks serves many cases
LEARNED = {"name": "learned", "size": 2.0}
STAGE = {"width": 16, "heads": 2, "encoder": "m1", "decoder": "T1", "window": 8, "patcher": LEARNED, "patches": 24}
STAGES = [STAGE, STAGE | {"encoder": "t1", "decoder": "m1", "patches": 9}]
AU_NET = [
    STAGE | {"patcher": {"name": "byte_class"}, "patches": 7, "join": "multi_linear", "places": 3},
    STAGE | {"patcher": {"name": "fixed", "size": 2}, "patches": 3, "join": "multi_linear", "places": 2},
]
ADAPTERS = {"freeze": ["*"], "train": ["*norm*"], "adapters": {"layers": ["*"], "rank": 2}}
ENTROPY: dict[str, Any] = {"patches": 9, "patcher": {"name": "entropy", "threshold": 5.0}}
WIDE, NARROW = {"width": 36, "heads": 3, "layers": "T1"}, {"width": 24, "heads": 2}
STEPS = 4
RATE = 1e-3
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "zero1": {"name": "zero1"},
    "zero2": {"name": "zero2"},
    "zero3": {"name": "zero3"},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "words": ("spacebyte", {"changes": {"patches": 7}}),
    "words of blt": ("blt", {"changes": {"patches": 7, "encoder_attention": "all"}}),
    "entropy": ("blt", {"changes": ENTROPY}),
    "entropy of spacebyte": ("spacebyte", {"changes": ENTROPY}),
    "entropies of a corpus": ("blt", {"changes": ENTROPY | {"patcher": ENTROPY["patcher"] | {"entropies": "corpus"}}}),
    "entropy, adapters": ("blt", {"changes": ENTROPY, "finetune": ADAPTERS}),
    "two stages": ("hnet", {"changes": {"stages": STAGES}}),
    "two stages, heads": ("hnet", {"changes": {"stages": STAGES, "multi_byte": {"heads": 3}}}),
    "two stages, mup": ("hnet", {"changes": {"stages": STAGES, "main": WIDE}, "base": {"main": NARROW}}),
    "two stages, adapters": ("hnet", {"changes": {"stages": STAGES}, "finetune": ADAPTERS}),
    "words and pairs": ("hnet", {"changes": {"stages": AU_NET}}),
    "no patches": ("mamba", {}),
}
"""Family and arguments of `build` by name."""
SOME = {"ddp": ("entropy",), "fsdp": ("two stages, heads",), "zero3": ("two stages, mup",)}
"""Cases of each engine in `make test`."""
EVERY = dict.fromkeys(ENGINES, tuple(CASES))
RESUMED = [
    ("two stages", "fsdp", {}),
    ("two stages", "zero1", {}),
    ("two stages", "zero1", {"precision": "bf16"}),
    ("two stages, mup", "zero2", {"offload": True}),
    ("two stages, mup", "zero3", {}),
]
"""Case, engine and further fields of the engine."""


def extreme_rows(step: int, kind: int) -> np.ndarray:
    """Return a micro-batch: of one patch and of padding; of as many patches as possible; at step 2, of padding."""
    if step == 2:
        return np.full((MICRO_BATCH, T), PADDING, np.int16)
    if kind == 0:
        return np.stack([np.full(T, ord("a"), np.int16), np.full(T, PADDING, np.int16)])
    return np.stack([np.full(T, SEPARATOR, np.int16), np.resize(np.array([ord(" "), ord("a")], np.int16), T)])


def micro_batches(step: int, world: World = ALONE) -> list[MicroBatch]:
    """Return a rank's part of the batch of a step. Of two ranks, one has the extremes."""
    batch = []
    for index in range(-(-ROWS // MICRO_BATCH)):
        random = np.random.default_rng([step, index]).integers(0, 257, (MICRO_BATCH, T)).astype(np.int16)
        ids = extreme_rows(step, index // 2) if step < 3 and index % 2 == step % 2 else random
        ids = ids[: ROWS - index * MICRO_BATCH]
        batch.append(MicroBatch(index, rows_of(ids), ids != PADDING))
    return batch[world.rank :: world.size]


def built(case: str, world: World = ALONE, export: Path | None = None, **engine: Any) -> Any:
    """Return the engine of a case, whose small model for entropies is an export."""
    family, how = CASES[case]
    if "patcher" in (changes := how.get("changes", {})):
        how = how | {"changes": changes | {"patcher": changes["patcher"] | {"model": str(export)}}}
    return build(family, world, **how, **engine)


def with_entropies(batch: list[MicroBatch]) -> list[MicroBatch]:
    """Return micro-batches with entropies as a corpus has them: from 0, without a patch, to 10 nats."""
    made = [np.random.default_rng(each.index).random(each.targets.shape) for each in batch]
    examples = [
        Example(each.ids, each.targets, (10 * own * (each.index % 2)).astype(np.float16))
        for each, own in zip(batch, made, strict=True)
    ]
    return [replace(each, example=example) for each, example in zip(batch, examples, strict=True)]


def training(world: World, engine: Mapping[str, Any], case: str, export: Path) -> list[float]:
    """Train for some steps; return the losses and gradient norms."""
    trained, found = built(case, world, export, **engine), []
    for step in range(STEPS):
        batch = micro_batches(step, world)
        batch = with_entropies(batch) if "corpus" in case else batch
        result = trained.train_step(batch, step=step, learning_rate=RATE * (step + 1) / STEPS)
        assert result.is_updated
        found += [result.nats / result.target_bytes, result.gradient_norm]
    return found


def trainings(world: World, cases: Sequence[tuple[str, str]], export: Path) -> dict[tuple[str, str], list[float]]:
    return {(name, case): training(world, ENGINES[name], case, export) for name, case in cases}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an export of a small model with random weights."""
    folder = tmp_path_factory.mktemp("export") / "small"
    torch.manual_seed(5)
    config = small_config("transformer", window=4)
    weights = {name: torch.randn(each.shape) * 0.3 for name, each in build_model(config).named_parameters()}
    write_export(folder, weights, {"model": config.model_dump(mode="json")}, {})
    return folder


def groups_after_a_step(engine: Any, world: World = ALONE) -> list[tuple[float, float, float]]:
    """Take a step; return weight decay, multiplier and rate of each parameter group."""
    engine.train_step(micro_batches(STEPS, world), step=STEPS, learning_rate=RATE)
    optimizers = [engine._zero.optimizer] if hasattr(engine, "_zero") else engine._optimizers
    found = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [(group["weight_decay"], group[MULTIPLIER], group["lr"]) for group in found]


def resumed_groups(world: World, folder: Path) -> list[Any]:
    """Resume under each engine of RESUMED from the checkpoint of one process; return the parameter groups of each."""
    engines = (load(built(case, world, **ENGINES[name], **more), folder / case) for case, name, more in RESUMED)
    return [groups_after_a_step(engine, world) for engine in engines]


def test_rates_of_stages_and_exceptions_from_decay_hold_right_after_a_resume(tmp_path: Path):
    expected = {}
    for case in dict.fromkeys(case for case, *_ in RESUMED):
        engine = built(case)
        save(engine, tmp_path / case, STEPS)
        expected[case] = groups_after_a_step(engine)
    multipliers = built("two stages").model.multipliers
    assert len(set(multipliers)) == 3  # two stages and the main stack
    assert {multiplier for _, multiplier, _ in expected["two stages"]} == set(multipliers)
    assert {multiplier for _, multiplier, _ in expected["two stages, mup"]} != set(multipliers)
    for groups in expected.values():
        assert {decay == 0 for decay, *_ in groups} == {True, False}
        assert [rate for *_, rate in groups] == pytest.approx([RATE * multiplier for _, multiplier, _ in groups])
    for found in on_ranks(2, resumed_groups, tmp_path):
        assert found == [expected[case] for case, *_ in RESUMED]


@pytest.mark.parametrize("of_engines", [SOME, pytest.param(EVERY, marks=pytest.mark.long)], ids=["some", "every"])
def test_ranks_with_extreme_rows_train_as_one_process(of_engines: Mapping[str, Sequence[str]], export: Path):
    cases = [(name, case) for name, of_engine in of_engines.items() for case in of_engine]
    alone = {case: training(ALONE, {"name": "ddp"}, case, export) for _, case in cases}
    for found in on_ranks(2, trainings, cases, export):
        for name, case in cases:
            expected = alone[case]
            assert all(map(math.isfinite, expected))
            assert found[name, case] == pytest.approx(expected, rel=1e-5), (name, case)
