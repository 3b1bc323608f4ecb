"""The same training on any engine and any number of ranks: what tests run on each rank."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.stream.loader import MicroBatch
from pretrain.checkpoint import CheckpointStore, read, verify
from pretrain.distributed.fragments import whole
from pretrain.distributed.world import ALONE, World
from pretrain.engines import Engine, EngineConfig, build_engine
from pretrain.models import ByteModel, all_families, build_model, small_config
from pretrain.optim import OptimizerConfig
from tests.pretrain.models.rows import rows_of

T, ROWS, MICRO_BATCH = 32, 7, 2
"""Four micro-batches, the last of one row."""
WARM_UP = 10
"""Steps. Without it Adam's first ones divide by next to nothing, and make much of a rounding."""
FAMILIES = tuple(all_families())


def model(family: str) -> ByteModel:
    """On the meta device, dropout on."""
    with torch.device("meta"):
        return build_model(small_config(family))


def build(family: str, world: World = ALONE, **engine: Any) -> Engine:
    """An engine with the first values in it."""
    config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32"} | engine)
    it = build_engine(config, model(family), OptimizerConfig(), 3, world, global_batch=ROWS, micro_batch=MICRO_BATCH)
    it.begin()
    return it


def micro_batches(step: int, world: World = ALONE) -> list[MicroBatch]:
    """A rank's part of the batch of a step, in which some positions are no targets."""
    ids = np.random.default_rng(step).integers(0, 257, (ROWS, T)).astype(np.int16)
    targets = np.random.default_rng(1000 + step).random((ROWS, T)) < 0.7
    parts = [slice(first, first + MICRO_BATCH) for first in range(0, ROWS, MICRO_BATCH)]
    batch = [MicroBatch(index, rows_of(ids[part]), targets[part]) for index, part in enumerate(parts)]
    return batch[world.rank :: world.size]


def losses(it: Engine, steps: range, world: World = ALONE) -> list[float]:
    """Nats a byte of each step."""
    told = []
    for step in steps:
        learning_rate = 1e-3 * min(1.0, (step + 1) / WARM_UP)
        result = it.train_step(micro_batches(step, world), step=step, learning_rate=learning_rate)
        told.append(result.nats / result.target_bytes)
    return told


def newest(folder: Path) -> Path:
    """The newest checkpoint of a folder of them."""
    return CheckpointStore(folder, keep=1).committed()[-1]


def content(checkpoint: Path) -> dict[str, bytes]:
    """All bits of its tensors, by name."""
    metadata = verify(checkpoint)
    tensors = {name: torch.full(stored.shape, math.nan) for name, stored in metadata.tensors.items()}
    read(metadata, [whole(name, tensor) for name, tensor in tensors.items()])
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def losses_of_all(
    world: World, cases: dict[str, dict[str, Any]], families: Sequence[str], steps: int
) -> dict[str, list[float]]:
    """The losses of every family under each of some engine configs."""
    return {
        f"{family} {name}": losses(build(family, world, **engine), range(steps), world)
        for family in families
        for name, engine in cases.items()
    }


def checkpointing_of_all(world: World, modes: Sequence[str], precision: str) -> dict[str, tuple[list[float], bytes]]:
    """The losses of a few steps of every family under FSDP2 with each mode of activation checkpointing.

    And all bits of this rank's masters and moments after them.
    """
    told = {}
    for family in FAMILIES:
        for mode in modes:
            it = build(family, world, name="fsdp", precision=precision, activation_checkpointing=mode)
            of_steps = losses(it, range(4), world)
            told[f"{family} {mode}"] = of_steps, b"".join(f.data.numpy().tobytes() for f in it.fragments())
    return told
