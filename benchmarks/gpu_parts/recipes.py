"""Part recipes: the large recipes of the other families."""

from collections.abc import Iterator

import torch

from gpu_parts import Row, Setting
from gpu_parts.models import engine_of, recipe_model
from gpu_parts.speed import step_rows
from pretrain.engines import EngineError

RECIPES = ("perceiver_ar/text-228m", "transformer_xl/enwik8-24-layers", "transformer_xl/enwik8-12-layers")
MICRO_BATCH = 8


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the speed of each recipe."""
    for name in RECIPES:
        config = recipe_model(setting, name)
        title = f"{name}, eager, micro-batch {MICRO_BATCH}"
        try:
            engine = engine_of(setting, config, micro_batch=MICRO_BATCH)
            yield from step_rows(setting, title, config, engine, MICRO_BATCH)
        except (torch.OutOfMemoryError, EngineError) as error:
            yield Row(title, None, "", f"left out: {str(error).splitlines()[0]}")
        engine = None
        setting.free_memory()
