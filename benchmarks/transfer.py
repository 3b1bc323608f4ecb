"""Best learning rate by width, in the standard and in the maximal update parametrization.

python benchmarks/transfer.py BOOKS [--quick] [--family FAMILY] [--json PATH] [--plot PATH]

BOOKS is a folder of text files or one such file. Models of three widths train on the same rows of its bytes, each row
once, with AdamW and every rate. The loss is the mean over the last steps, in bits per byte; the rows of these steps are
new to the model. The base of `optimizer.scaling` mup is the narrowest model. Matplotlib comes with mlflow.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.report import Metric, report
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Rows
from pretrain.engines import EngineConfig, build_engine
from pretrain.models import build_model, model_config
from pretrain.optim import OptimizerConfig, learning_rate_at
from pretrain.optim.scaling import scale_model

WIDTHS = (16, 32, 64)
HEAD_WIDTH = 8
SCALINGS = ("standard", "mup")
RATES = tuple(2.0**power for power in range(-9, -3))
LENGTH, ROWS = 32, 16
STEPS, QUICK_STEPS, WARMUP = 120, 20, 8
SCORED = 0.2
"""Share of the steps whose losses count."""
WORST = 6.0
"""Bits per byte above which a run counts as diverged, on the plot."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path, help="folder of text files, or a file")
    parser.add_argument("--quick", action="store_true", help=f"train for {QUICK_STEPS} steps")
    parser.add_argument("--family", choices=("mamba", "spacebyte", "transformer"), default="transformer")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    parser.add_argument("--plot", type=Path, help="write the plot as PNG here")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    steps = QUICK_STEPS if chosen.quick else STEPS
    rows = rows_of(chosen.books, steps)
    losses = {
        (scaling, width): [bits_per_byte(chosen.family, scaling, width, rate, rows) for rate in RATES]
        for scaling in SCALINGS
        for width in WIDTHS
    }
    metrics = []
    for (scaling, width), bits in losses.items():
        best = int(np.argmin(bits))
        detail = "  ".join(f"{each:.3f}" for each in bits)
        metrics.append(Metric(f"{scaling}, width {width}: best rate", RATES[best], "", detail))
    rates = ", ".join(f"{rate:.2g}" for rate in RATES)
    report(f"Bits per byte of {chosen.family} after {steps} steps at the rates {rates}", metrics, chosen.json)
    if chosen.plot:
        plot(losses, chosen.plot)


def rows_of(books: Path, steps: int) -> NDArray[np.uint8]:
    """Return (steps, ROWS, LENGTH) bytes of text files, at random places that do not repeat."""
    files = sorted(path for path in books.rglob("*") if path.is_file()) if books.is_dir() else [books]
    text = np.frombuffer(b"".join(path.read_bytes() for path in files), np.uint8)
    whole = text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)
    places = np.random.default_rng(0).choice(len(whole), steps * ROWS, replace=False)
    return whole[places].reshape(steps, ROWS, LENGTH)


def sizes(family: str, width: int) -> dict[str, Any]:
    """Return the fields of a model of a width."""
    stack = {"width": width, "layers": 2, "heads": width // HEAD_WIDTH}
    if family == "spacebyte":
        return {"local_model": stack, "global_model": stack, "patches": LENGTH // 2}
    if family == "mamba":
        return {"width": width, "layers": 4, "head_width": HEAD_WIDTH, "state": 16}
    return stack


def bits_per_byte(family: str, scaling: str, width: int, rate: float, rows: NDArray[np.uint8]) -> float:
    """Train a model on rows, and return the mean loss of the last steps."""
    tree = {"family": family, "sequence_length": LENGTH, "dropout": 0.0, "initial_std": 0.125}
    config = model_config(tree | sizes(family, width))
    schedule = {"shape": "constant", "warmup_steps": WARMUP}
    base = sizes(family, WIDTHS[0]) if scaling == "mup" else {}
    optimizer = OptimizerConfig.model_validate(
        {"learning_rate": rate, "schedule": schedule, "scaling": scaling, "base": base}
    )
    with torch.device("meta"):
        model = scale_model(build_model(config), config, optimizer)
    settings = EngineConfig.model_validate({"device": "cpu", "precision": "fp32"})
    engine = build_engine(settings, model, optimizer, seed=0, global_batch=ROWS, micro_batch=ROWS)
    engine.begin()
    nats = []
    for step, content in enumerate(rows):
        batch = [MicroBatch(0, Rows(content, np.empty(0, np.int64), None), np.ones(content.shape, bool))]
        result = engine.train_step(batch, step=step, learning_rate=learning_rate_at(optimizer, step, len(rows)))
        nats.append(result.nats / result.target_bytes)
    bits = float(np.mean(nats[-round(SCORED * len(rows)) :])) / math.log(2)
    print(f"{scaling}, width {width}, rate {rate:.2g}: {bits:.3f}", file=sys.stderr)
    return bits


def plot(losses: dict[tuple[str, int], list[float]], path: Path) -> None:
    """Write the losses over the rate, by parametrization."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for scaling, axis in zip(SCALINGS, figure.subplots(1, 2, sharey=True), strict=True):
        for width in WIDTHS:
            bits = np.minimum(losses[scaling, width], WORST)
            (line,) = axis.plot(RATES, bits, "o-", markersize=4, label=f"width {width}")
            best = int(np.argmin(bits))
            axis.plot(RATES[best], bits[best], "*", markersize=15, color=line.get_color())
        axis.set(xlabel="learning rate", title=f"optimizer.scaling {scaling}")
        axis.set_xscale("log", base=2)
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
    figure.axes[0].set_ylabel("bits per byte")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
