"""Growth of a training step's time and memory with the context: MEGABYTE, Perceiver AR and the Transformer.

python benchmarks/growth.py [--quick] [--json PATH] [--plot PATH]

A step reads one row of T random bytes, in bf16 (fp32 if the CPU emulates bf16), with activation checkpointing. Each
length has its own process, which measures the second of two steps (from 131,072 bytes on, the first). MEGABYTE's patch
size is the power of two nearest to the cube root of T, so that its attention costs T^(4/3). The Transformer stops
before a step would take minutes. Peak memory is the peak of the whole process. Matplotlib comes with mlflow.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.figure import Figure

from common.batch import random_batch
from common.report import Metric, native_precisions, report
from pretrain.engines import EngineConfig, build_engine, peak_resident_bytes
from pretrain.models import build_model, model_config
from pretrain.optim import OptimizerConfig

LENGTHS = [2**n for n in range(13, 21)]
LONGEST = {"megabyte": 2**20, "perceiver_ar": 2**20, "transformer": 2**14}
ALONE = 2**17
"""Shortest length whose first step is measured."""
MEMORY_GOAL = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute: up to 32,768 bytes")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    parser.add_argument("--plot", type=Path, help="write the plot as PNG here")
    parser.add_argument(
        "--only", nargs=2, metavar=("FAMILY", "T"), help="measure one family and length in this process and print JSON"
    )
    chosen = parser.parse_args()
    if chosen.only:
        print(json.dumps(step(chosen.only[0], int(chosen.only[1]))))
        return
    longest = 2**15 if chosen.quick else 2**20
    rows = []
    for family, last in LONGEST.items():
        for length in LENGTHS:
            if length <= min(last, longest):
                command = [sys.executable, __file__, "--only", family, str(length)]
                rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    metrics = []
    for row in rows:
        name = f"{row['family']}, T = {row['length']:,}"
        million = row["family"] == "megabyte" and row["length"] == 2**20
        memory = row["peak_bytes"] / 2**30
        goal = MEMORY_GOAL if million else None
        metrics += [
            Metric(f"{name}: time", row["seconds"] / row["length"] * 1e6, "µs/byte", f"{row['seconds']:.1f} s"),
            Metric(f"{name}: memory", memory, "GiB", f"patches of {row['patch']}", goal, better="lower"),
        ]
    report("Growth with the context", metrics, chosen.json)
    if chosen.plot:
        plot(rows, chosen.plot)


def step(family: str, length: int) -> dict[str, float | str | None]:
    """Measure a training step on one row: the second of two, or the first if the row is long."""
    wide = {"width": 512, "layers": 4, "heads": 8}
    patch = 2 ** round((length.bit_length() - 1) / 3) if family == "megabyte" else None
    sizes = {
        "megabyte": {"global_model": wide, "local_model": {"width": 128, "layers": 2, "heads": 2}, "patch_size": patch},
        "perceiver_ar": {"latents": 1024, "latent_model": wide, "cross_heads": 8},
        "transformer": wide,
    }[family]
    model = build_model(model_config({"family": family, "sequence_length": length, "dropout": 0.0} | sizes))
    engine = build_engine(
        EngineConfig.model_validate({"precision": native_precisions()[-1], "activation_checkpointing": "full"}),
        model,
        OptimizerConfig(),
        seed=0,
    )
    batch = random_batch(1, length)
    seconds = 0.0
    for _ in range(2 if length < ALONE else 1):
        start = time.perf_counter()
        engine.train_step(batch, step=0, learning_rate=1e-4)
        seconds = time.perf_counter() - start
    peak = peak_resident_bytes()
    return {"family": family, "length": length, "patch": patch, "seconds": seconds, "peak_bytes": peak}


def plot(rows: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2)
    for family in LONGEST:
        own = [row for row in rows if row["family"] == family]
        lengths = [row["length"] for row in own]
        time_axis.plot(lengths, [row["seconds"] / row["length"] * 1e6 for row in own], "o-", label=family)
        memory_axis.plot(lengths, [row["peak_bytes"] / row["length"] / 1024 for row in own], "o-", label=family)
    for axis, label in ((time_axis, "microseconds per byte"), (memory_axis, "KiB of peak memory per byte")):
        axis.set(yscale="log", xlabel="context (bytes)", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
