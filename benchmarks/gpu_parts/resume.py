"""Part resume: 20 steps, against 10 steps, a checkpoint, and 10 steps of a new engine."""

import tempfile
from collections.abc import Iterator
from itertools import product

from gpu_parts import Row, Setting
from gpu_parts.models import FAMILIES, engine_of, train
from pretrain.checkpoint import CheckpointStore
from pretrain.engines import Engine
from pretrain.models import ModelConfig, small_config

TOLERANCE = 1e-3
"""Largest difference of a loss, relative, where kernels may add in any order."""


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the largest difference of the losses, of a resumed and of a repeated training."""
    steps, saved = setting.pick((20, 10), (4, 2))
    for deterministic, name in product((False, True), setting.pick(FAMILIES, FAMILIES[:1])):
        config = small_config(name, dropout=0.1)
        whole, again = (
            train(_engine(setting, config, deterministic), config, range(steps), micro_batch=2) for _ in range(2)
        )
        engine = _engine(setting, config, deterministic)
        losses = train(engine, config, range(saved), micro_batch=2)
        with tempfile.TemporaryDirectory() as folder:
            CheckpointStore(folder, keep=1).save(saved, engine.owned_fragments(), {"counters": engine.counters()})
            engine = _engine(setting, config, deterministic)
            metadata = CheckpointStore(folder, keep=1).load(lambda _, engine=engine: engine.fragments())
            assert metadata is not None
            engine.restore(metadata.state["counters"])
        losses += train(engine, config, range(saved, steps), micro_batch=2)
        kernels, most = ("deterministic", 0.0) if deterministic else ("default", TOLERANCE)
        for what, own in (("resumed", losses), ("repeated", again)):
            worst = max(abs(a / b - 1) for a, b in zip(own, whole, strict=True))
            title = f"{name}, {kernels}: largest difference of a loss, {what}"
            yield Row(title, worst, "", f"of {steps} steps; at most {most:g}", worst <= most)


def _engine(setting: Setting, config: ModelConfig, deterministic: bool) -> Engine:
    return engine_of(setting, config, micro_batch=2, deterministic=deterministic)
