"""The same training on any engine and any number of ranks: functions that tests run on each rank."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.stream.loader import MicroBatch
from data_pipeline.vocabulary import SEPARATOR
from pretrain.checkpoint import CheckpointStore, read, verify
from pretrain.conformance.subject import Subject
from pretrain.distributed.context import group_of
from pretrain.distributed.fragments import whole
from pretrain.distributed.world import ALONE, World
from pretrain.engines import Engine, EngineConfig, Upcoming, build_engine
from pretrain.models import ByteModel, all_families, build_model, small_config
from pretrain.models.finetune import FinetuneConfig, apply
from pretrain.objectives import show_rows
from pretrain.optim import OptimizerConfig
from pretrain.optim.scaling import scale_model
from tests.pretrain.models.rows import rows_of

T, ROWS, MICRO_BATCH = 32, 7, 2
"""Four micro-batches, the last of one row."""
WARM_UP = 6
"""Warm-up steps. Without them, Adam's first steps divide by almost nothing and magnify rounding."""
FAMILIES = tuple(all_families())
HNET_STAGE = {"heads": 2, "decoder": "T1", "window": 8}
FIELDS: dict[str, dict[str, Any]] = {
    "hnet": {
        "stages": [
            HNET_STAGE | {"width": 16, "encoder": "m1", "patcher": {"name": "learned", "size": 3}, "patches": 20},
            HNET_STAGE
            | {"width": 24, "encoder": "t1", "patcher": {"name": "fixed", "size": 2}, "patches": 9}
            | {"join": "multi_linear", "places": 3},
        ]
    },
    "mamba": {"multi_byte": {"heads": 3}},
    "spacebyte": {"multi_byte": {"heads": 2, "layers": 0}},
}
"""Config fields by which small models here have further heads, or stages of both kinds."""


def model(family: str, **changes: Any) -> ByteModel:
    """Return a small model of a family on the meta device, with dropout."""
    with torch.device("meta"):
        return build_model(small_config(family, **FIELDS.get(family, {}) | changes))


def rate_multiplier(name: str) -> float:
    """Return one of three multipliers: of embeddings, of feed-forward layers, and of other parameters."""
    return 30.0 if "embedding" in name else 0.1 if "feed_forward" in name else 1.0


def may_decay(name: str) -> bool:
    """Return whether a parameter may decay: attention is exempt."""
    return "attention" not in name


def build(
    family: str,
    world: World = ALONE,
    optimizer: str = "adamw",
    changes: Mapping[str, Any] = {},
    finetune: Mapping[str, Any] = {},
    *,
    base: Mapping[str, Any] = {},
    has_multipliers: bool = False,
    **engine: Any,
) -> Engine:
    """Build an engine that holds the initial values of a small model, whose config may have changes.

    With `base`, which is `optimizer.base`, the model is scaled by mup.
    """
    config = EngineConfig.model_validate({"device": "cpu", "precision": "fp32"} | engine)
    scaling = {"scaling": "mup", "base": base} if base else {}
    how = OptimizerConfig.model_validate({"name": optimizer} | scaling)
    of_model = small_config(family, **FIELDS.get(family, {}) | dict(changes))
    small = model(family, **changes)
    with torch.device("meta"):
        apply(FinetuneConfig.model_validate(finetune), small)
    scale_model(small, of_model, how)
    if has_multipliers:
        small.rate_multiplier, small.may_decay = rate_multiplier, may_decay  # type: ignore[method-assign]
    built = build_engine(config, small, how, 3, world, global_batch=ROWS, micro_batch=MICRO_BATCH)
    built.begin()
    return built


def micro_batches(step: int, world: World = ALONE, context: int = 1, family: str = "transformer") -> list[MicroBatch]:
    """Return a rank's part of the batch of a step, in which some positions are not targets.

    The first objective that trains the family shows the rows.
    """
    ids = np.random.default_rng(step).integers(0, 257, (ROWS, T)).astype(np.int16)
    ids[np.random.default_rng(2000 + step).random((ROWS, T)) < 0.05] = SEPARATOR
    targets = np.random.default_rng(1000 + step).random((ROWS, T)) < 0.7
    parts = [slice(first, first + MICRO_BATCH) for first in range(0, ROWS, MICRO_BATCH)]
    subject = Subject.of(family)
    batch = [MicroBatch(index, rows_of(ids[part]), targets[part]) for index, part in enumerate(parts)]
    if show := show_rows(subject.objective, subject.form, 0):
        examples = [
            show(each.rows, step * ROWS + np.arange(ROWS)[part]) for each, part in zip(batch, parts, strict=True)
        ]
        batch = [replace(each, targets=own.targets, example=own) for each, own in zip(batch, examples, strict=True)]
    group, groups = group_of(world.rank, world.size, context)
    return batch[group::groups]


def losses(
    engine: Engine, steps: range, world: World = ALONE, context: int = 1, family: str = "transformer"
) -> list[float]:
    """Train for some steps and return the nats per byte of each. Several ranks look ahead, as in a run."""
    nats_per_byte, ahead = [], range(steps.start, steps.stop + 1)
    batches = [micro_batches(step, world, context, family) for step in ahead]
    for step, batch, following in zip(steps, batches, batches[1:], strict=False):
        upcoming = Upcoming(following, [world.rank])
        result = engine.train_step(
            batch,
            step=step,
            learning_rate=1e-3 * min(1.0, (step + 1) / WARM_UP),
            look_ahead=None if world.size == 1 else lambda upcoming=upcoming: upcoming,
        )
        assert result.upcoming == ([[]] if world.size == 1 else [[rank] for rank in range(world.size)])
        nats_per_byte.append(result.nats / result.target_bytes)
    return nats_per_byte


def newest(folder: Path) -> Path:
    """Return the newest checkpoint of a folder of checkpoints."""
    return CheckpointStore(folder, keep=1).committed()[-1]


def content(checkpoint: Path) -> dict[str, bytes]:
    """Return the bytes of all tensors of a checkpoint, by name."""
    metadata = verify(checkpoint)
    tensors = {name: torch.full(stored.shape, math.nan) for name, stored in metadata.tensors.items()}
    read(metadata, [whole(name, tensor) for name, tensor in tensors.items()])
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def losses_of_all(
    world: World, engines: dict[str, dict[str, Any]], cases: Sequence[tuple[str, str]], steps: int, optimizer: str
) -> dict[tuple[str, str], list[float]]:
    """Return the losses of each case, which is a family and the name of an engine config."""
    return {
        (family, name): losses(build(family, world, optimizer, **engines[name]), range(steps), world, family=family)
        for family, name in cases
    }


def checkpointing_of_all(
    world: World, modes: Sequence[str], families_by_precision: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], list[tuple[list[float], bytes]]]:
    """Return the results of families under FSDP2 with each mode of activation checkpointing, by family and precision.

    A result is the losses, and the bytes of this rank's masters and moments after the last step.
    """
    results: dict[tuple[str, str], list[tuple[list[float], bytes]]] = {}
    for precision, families in families_by_precision.items():
        for family, mode in itertools.product(families, modes):
            engine = build(family, world, name="fsdp", precision=precision, activation_checkpointing=mode)
            step_losses = losses(engine, range(4), world, family=family)
            state = b"".join(fragment.data.numpy().tobytes() for fragment in engine.fragments())
            results.setdefault((family, precision), []).append((step_losses, state))
    return results
