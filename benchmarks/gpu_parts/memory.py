"""Part memory: what `byteloom models estimate` says, and what is allocated."""

from collections.abc import Iterator

import torch

from gpu_parts import Row, Setting
from gpu_parts.models import LARGEST, batch_of, engine_of, recipe_model
from pretrain.engines import CheckpointingConfig, EngineConfig
from pretrain.estimate.activations import measure_activations, on_meta
from pretrain.estimate.states import states_on_rank
from pretrain.models import ModelConfig
from pretrain.optim import OptimizerConfig

CASES = (
    (LARGEST, 1, "none"),
    (LARGEST, 8, "full"),
    ("perceiver_ar/text-228m", 2, "none"),
    ("transformer_xl/enwik8-24-layers", 8, "none"),
    ("transformer/size-350m", 8, "selective"),
)
TOLERANCE = 0.1
"""Largest difference, relative to what is allocated."""


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the ratio of estimated to allocated memory."""
    for name, micro_batch, mode in CASES:
        config = recipe_model(setting, name)
        checkpointing = CheckpointingConfig(mode=mode)
        setting.free_memory()
        before = torch.cuda.memory_allocated(setting.device) if setting.is_cuda else 0
        engine = engine_of(setting, config, micro_batch=micro_batch, activation_checkpointing=mode)
        for step in range(2):
            engine.train_step(batch_of(config, micro_batch=micro_batch), step=step, learning_rate=1e-5)
        title = f"{name}, micro-batch {micro_batch}, {mode}"
        estimated = sum(_estimate(config, engine.dtype, micro_batch, checkpointing))
        if not setting.is_cuda:
            yield Row(f"{title}: estimated", estimated / 2**30, "GiB", "a CPU does not say what is allocated")
            continue
        allocated = torch.cuda.max_memory_allocated(setting.device) - before
        reserved = torch.cuda.max_memory_reserved(setting.device)
        detail = f"{estimated / 2**30:.3g} of {allocated / 2**30:.3g} GiB; {reserved / 2**30:.3g} reserved"
        ratio = estimated / allocated
        yield Row(f"{title}: estimated / allocated", ratio, "", detail, abs(ratio - 1) <= TOLERANCE)
        del engine


def _estimate(
    config: ModelConfig, dtype: torch.dtype, micro_batch: int, checkpointing: CheckpointingConfig
) -> tuple[int, int]:
    """Return the bytes of states and of activations."""
    states = states_on_rank(EngineConfig(), OptimizerConfig().entry, on_meta(config), dtype, ranks=1)
    return sum(states), measure_activations(config, micro_batch, dtype, checkpointing).peak
