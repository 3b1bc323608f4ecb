"""A training step of the books recipe compared with the peak of matrix products in the same dtype.

python benchmarks/training.py [--quick] [--json PATH]
"""

from functools import partial
from pathlib import Path

import torch

from common.batch import random_batch
from common.report import Metric, interleaved, native_precisions, options, report
from pretrain.config.loading import load
from pretrain.engines import build_engine, compute_dtype
from pretrain.models import build_model

RECIPE = Path(__file__).parents[1] / "configs/megabyte/books-10m.yaml"
SIZE = 2048


def product(square: torch.Tensor) -> float:
    return (square @ square)[0, 0].item()  # waits for the device


def main() -> None:
    chosen = options(__doc__)
    metrics = []
    for precision in native_precisions():
        config = load(RECIPE, [f"engine.precision={precision}"])
        torch.manual_seed(0)
        model = build_model(config.model)
        engine = build_engine(config.engine, model, config.optimizer, seed=0)
        rows, length = config.train.micro_batch, config.model.sequence_length
        batch = random_batch(rows, length)
        square = torch.randn(SIZE, SIZE, device=engine.device).to(compute_dtype(precision))
        work = {
            "step": partial(engine.train_step, batch, step=0, learning_rate=1e-4),
            "product": partial(product, square),
        }
        seconds = interleaved(work, rounds=4 if chosen.quick else 20)
        peak = 2 * SIZE**3 / seconds["product"]
        flops = 3 * model.flops(length) * rows / seconds["step"]
        shape = f"{model.parameter_count():,} parameters, {rows} rows of {length}"
        metrics += [
            Metric(f"{precision} training", rows * length / seconds["step"] / 1e3, "kB/s", shape),
            Metric(f"{precision} MFU", flops / peak, "", f"of {peak / 1e9:.0f} GFLOP/s, a {SIZE}-cubed product"),
        ]
    report("A training step", metrics, chosen.json)


if __name__ == "__main__":
    main()
