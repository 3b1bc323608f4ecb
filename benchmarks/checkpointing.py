"""Time and memory of each mode of activation checkpointing, at a context of 65,536 bytes.

python benchmarks/checkpointing.py [--quick] [--compile] [--json PATH]

The model is a MEGABYTE with patches of 32 (global 512 wide, 8 layers; local 128 wide, 4 layers). It trains on one row,
in bf16, or in fp32 if the CPU emulates bf16. A step is a step of the engine, with its update. The modes alternate. A
time is the median of the ratios to the step without checkpointing in the same round. `dropout` is 0.1, as in the paper.
On a CPU, attention inside the patches then keeps its weights, and recomputation mostly draws their masks again. On a
GPU that costs next to nothing.

Peak memory is that of all tensors except parameters, gradients and moments, in a forward and a backward pass.
`pretrain.estimate.activations` counts it (it does not sample): for this CPU, and for a GPU with fused attention.
`--compile` adds compiled blocks, which take minutes; the counter cannot see their memory. `--quick` runs one round at
8,192 bytes.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from common.report import Metric, native_precisions, report
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Rows
from pretrain.engines import CheckpointingConfig, Engine, EngineConfig, build_engine, compute_dtype
from pretrain.engines.blocks import recompute
from pretrain.estimate.activations import activations_of, measure_activations
from pretrain.models import ModelConfig, build_model, model_config
from pretrain.optim import OptimizerConfig

MODES = {
    "none": CheckpointingConfig(),
    "full": CheckpointingConfig(mode="full"),
    "full, every 2nd block": CheckpointingConfig(mode="full", every=2),
    "full, global stack": CheckpointingConfig(mode="full", stacks=("global",)),
    "full, local stack": CheckpointingConfig(mode="full", stacks=("local",)),
    "selective": CheckpointingConfig(mode="selective"),
}
DROPPING = {name: MODES[name] for name in ("none", "full")}
MEMORY_GOAL, TIME_GOAL = 0.5, 1.35
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute: one round at 8,192 bytes")
    parser.add_argument("--compile", action="store_true", help="measure compiled blocks as well")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    chosen = parser.parse_args()
    length = 2**13 if chosen.quick else 2**16
    rounds = 1 if chosen.quick else ROUNDS
    precision = native_precisions()[-1]
    metrics = compare(MODES, megabyte(length), precision, rounds, compiles=chosen.compile)
    metrics += compare(DROPPING, megabyte(length, dropout=0.1), precision, rounds)
    report(f"Activation checkpointing at T = {length:,}, {precision}", metrics, chosen.json)


def compare(
    modes: dict[str, CheckpointingConfig], config: ModelConfig, precision: str, rounds: int, *, compiles: bool = False
) -> list[Metric]:
    """Return time and peak memory of each mode, relative to no checkpointing."""
    engines = {name: engine_of(config, mode, precision) for name, mode in modes.items()}
    if compiles:
        engines["compiled"] = engine_of(config, CheckpointingConfig(), precision, compiles=True)
    times = step_times(engines, config.sequence_length, rounds)
    plain = statistics.median(times["none"])
    peak_bytes = {name: peaks(config, mode, compute_dtype(precision)) for name, mode in modes.items()}
    metrics = []
    for name, seconds in times.items():
        time_goal, memory_goal = (
            (TIME_GOAL, MEMORY_GOAL) if name == "full" and not config.dropout and rounds == ROUNDS else (None, None)
        )
        title = f"dropout, {name}" if config.dropout else name
        ratio = statistics.median(own / base for own, base in zip(seconds, times["none"], strict=True))
        metrics.append(Metric(f"{title}: step", ratio, "of none's", f"none: {plain:.2f} s", time_goal, "lower"))
        if name in peak_bytes:
            cpu, gpu = (own / base for own, base in zip(peak_bytes[name], peak_bytes["none"], strict=True))
            sizes = ", ".join(f"{size / 2**20:,.0f} MiB" for size in peak_bytes[name])
            detail = f"{sizes} as on a GPU: {gpu:.2f}"
            metrics.append(Metric(f"{title}: peak", cpu, "of none's", detail, memory_goal, "lower"))
    return metrics


def megabyte(length: int, dropout: float = 0.0) -> ModelConfig:
    stacks = {
        "global_model": {"width": 512, "layers": 8, "heads": 8},
        "local_model": {"width": 128, "layers": 4, "heads": 2},
    }
    return model_config(
        {"family": "megabyte", "sequence_length": length, "patch_size": 32, "dropout": dropout} | stacks
    )


def engine_of(config: ModelConfig, mode: CheckpointingConfig, precision: str, compiles: bool = False) -> Engine:
    engine_config = EngineConfig(precision=precision, activation_checkpointing=mode, compile=compiles)
    with torch.device("meta"):
        model = build_model(config)
    engine = build_engine(engine_config, model, OptimizerConfig(), seed=0)
    engine.begin()
    return engine


def step_times(engines: dict[str, Engine], length: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each engine's steps, taken in turn. The first step, which may compile, does not count."""
    content = np.random.default_rng(0).integers(0, 256, (1, length), np.uint8)
    batch = [MicroBatch(0, Rows(content, np.empty(0, np.int64), None), np.ones(content.shape, bool))]
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(1 + rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.train_step(batch, step=0, learning_rate=1e-4)
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def peaks(config: ModelConfig, mode: CheckpointingConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Return the peak bytes of activations on this CPU, and as on a GPU."""
    model = build_model(config).to(dtype)
    recompute(mode, model)
    on_cpu = activations_of(model, torch.zeros(1, config.sequence_length, dtype=torch.int16))
    return on_cpu.peak, measure_activations(config, 1, dtype, mode).peak


if __name__ == "__main__":
    main()
