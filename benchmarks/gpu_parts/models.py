"""Models, engines and batches of the parts."""

from typing import Any

import numpy as np
import torch
import yaml

from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Rows
from gpu_parts import ROOT, Setting
from pretrain.distributed.fragments import MODEL, split_name
from pretrain.distributed.world import ALONE
from pretrain.engines import Engine, EngineConfig, build_engine
from pretrain.models import ModelConfig, build_model, carries_memory, model_config, small_config
from pretrain.optim import OptimizerConfig

FAMILIES = ("megabyte", "perceiver_ar", "transformer", "transformer_xl")
LARGEST = "megabyte/pg19-best"
MOST_DRAWN_PARAMETERS = 50_000_000
"""Size up to which models begin with the values of a training run, which the CPU draws."""


def recipe_model(setting: Setting, name: str, **changes: Any) -> ModelConfig:
    """Return the model of a recipe, or the small model of its family at toy sizes."""
    tree = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))["model"]
    return small_config(tree["family"], **changes) if setting.toy else model_config(tree | changes)


def engine_of(
    setting: Setting,
    config: ModelConfig,
    *,
    micro_batch: int = 1,
    micro_batches: int = 1,
    optimizer: str = "adamw",
    **fields: Any,
) -> Engine:
    """Return an engine with first values; those of large models are only roughly as in training.

    Args:
        setting: of the measurements.
        config: of the model.
        micro_batch: rows of a micro-batch.
        micro_batches: of a step.
        optimizer: its name.
        fields: of the engine's config.
    """
    with torch.device("meta"):
        model = build_model(config)
    engine_config = EngineConfig.model_validate({"device": setting.device.type, "precision": "bf16"} | fields)
    engine = build_engine(
        engine_config,
        model,
        OptimizerConfig(name=optimizer),
        seed=0,
        world=ALONE,
        global_batch=micro_batch * micro_batches,
        micro_batch=micro_batch,
    )
    if engine.model.parameter_count() <= MOST_DRAWN_PARAMETERS:
        engine.begin()
    else:
        for fragment in engine.fragments():
            if split_name(fragment.name)[0] == MODEL:
                fragment.data.normal_(std=0.02)
    if carries_memory(config):
        engine.forget()
    return engine


def batch_of(config: ModelConfig, *, micro_batch: int = 1, micro_batches: int = 1, seed: int = 0) -> list[MicroBatch]:
    """Return micro-batches of random bytes, with a separator in each row."""
    random = np.random.default_rng(seed)
    shape = micro_batch, config.sequence_length
    places = np.arange(micro_batch) * config.sequence_length + config.sequence_length // 3
    batch = []
    for number in range(micro_batches):
        content = random.integers(0, 256, shape, np.uint8)
        content.reshape(-1)[places] = 0
        batch.append(MicroBatch(number, Rows(content, places, None), np.ones(shape, bool)))
    return batch


def train(engine: Engine, config: ModelConfig, steps: range, **sizes: int) -> list[float]:
    """Return the loss of each step."""
    losses = []
    for step in steps:
        result = engine.train_step(batch_of(config, seed=step, **sizes), step=step, learning_rate=1e-4)
        losses.append(result.nats / result.target_bytes)
    return losses


def random_ids(config: ModelConfig, rows: int) -> torch.Tensor:
    """Return (rows, T) random byte ids on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (rows, config.sequence_length), generator=generator)
