"""A training step of a small BLT whose small model reads each row, beside one that reads stored entropies.

python benchmarks/entropies.py [--quick] [--json PATH]

Steps of 8 rows of 1,024 random bytes in fp32, on one thread, in turn. The large model is the small BLT of
comparison.py, the small model has 2 layers of width 128 and a window of 64. Seconds are those of the processor, because
other programs disturb the clock more. Weights are random: steps do the same work for any patches.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.batch import random_batch
from common.compared import CONTEXT, model_tree
from common.entropy_patches import export_untrained
from common.report import Metric, in_turn, options, report
from data_pipeline.stream.rows import Example
from pretrain.engines import EngineConfig, build_engine
from pretrain.models import build_model, model_config
from pretrain.optim import OptimizerConfig

ROWS, ROUNDS = 8, 5
LARGE = "BLT, patches by spaces"
SMALL = {"width": 128, "layers": 2, "heads": 2, "window": 64, "dropout": 0.0, "initial_std": 0.02}


def main() -> None:
    """Measure, and print a table."""
    chosen = options(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        export_untrained({"family": "transformer", "sequence_length": CONTEXT, **SMALL}, Path(folder) / "small")
        trees = {source: tree(Path(folder), source) for source in ("inline", "corpus")}
        models = {source: build_model(model_config(each)) for source, each in trees.items()}
        flops = {source: model.flops(CONTEXT) / CONTEXT for source, model in models.items()}
        work = {source: step(model, has_entropies=source == "corpus") for source, model in models.items()}
        seconds = in_turn(work, 1 if chosen.quick else ROUNDS)
    metrics = [
        Metric(
            f"entropies {source}",
            ROWS * CONTEXT / seconds[source] / 1e3,
            "kB/s",
            f"{flops[source] / 1e6:.2f} million operations a byte in a forward pass",
        )
        for source in seconds
    ]
    share = f"{flops['corpus'] / flops['inline']:.2f} of the operations of a forward pass"
    ratio = Metric("corpus against inline", seconds["corpus"] / seconds["inline"], "of a step", share)
    report(f"A training step of {ROWS} rows of {CONTEXT:,} bytes, fp32", [*metrics, ratio], chosen.json)


def tree(folder: Path, source: str) -> dict[str, Any]:
    """Return the section `model` of the large model."""
    patcher = {"name": "entropy", "model": str(folder / "small"), "threshold": 5.0, "entropies": source}
    return model_tree("small", LARGE, CONTEXT) | {"patcher": patcher}


def step(model: Any, *, has_entropies: bool) -> Callable[[], object]:
    """Return a function that does a training step."""
    engine = build_engine(EngineConfig.model_validate({"precision": "fp32"}), model, OptimizerConfig(), seed=0)
    (batch,) = random_batch(ROWS, CONTEXT)
    if has_entropies:
        entropies = np.random.default_rng(0).uniform(4, 6, batch.targets.shape).astype(np.float16)
        batch = replace(batch, example=Example(batch.rows.ids, batch.targets, entropies))
    return lambda: engine.train_step([batch], step=0, learning_rate=1e-4)


if __name__ == "__main__":
    main()
