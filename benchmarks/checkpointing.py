"""What each mode of activation checkpointing costs in time, and saves in memory, at 65,536 bytes of context.

python benchmarks/checkpointing.py [--quick] [--compile] [--json PATH]

A MEGABYTE with patches of 32 (global 512 wide, 8 layers; local 128 wide, 4 layers), one row, in bf16, or in fp32 where
the CPU emulates bf16. A step is the engine's, with its update. Modes take turns; a time is the median of its ratios to
the step without checkpointing in the same round. `dropout` is of 0.1, as in the paper: on a CPU attention inside the
patches then keeps its weights, and drawing their masks again is most of what is computed again, which a GPU does for
next to nothing.

Peak memory is that of all tensors beside parameters, gradients and moments in a forward and a backward pass, counted
and not sampled, by `pretrain.estimate.activations`: of this CPU, and as on a GPU with fused attention. `--compile` adds
compiled blocks, which take minutes; their memory a counter cannot see. `--quick` is one round at 8,192 bytes.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Rows
from pretrain.engines import CheckpointingConfig, Engine, EngineConfig, build_engine, compute_dtype
from pretrain.engines.blocks import recompute
from pretrain.estimate.activations import activations_of, measure_activations
from pretrain.models import ModelConfig, build_model, model_config
from pretrain.optim import OptimizerConfig
from report import Metric, native_precisions, report

WAYS = {
    "none": CheckpointingConfig(),
    "full": CheckpointingConfig(mode="full"),
    "full, every 2nd block": CheckpointingConfig(mode="full", every=2),
    "full, global stack": CheckpointingConfig(mode="full", stacks=("global",)),
    "full, local stack": CheckpointingConfig(mode="full", stacks=("local",)),
    "selective": CheckpointingConfig(mode="selective"),
}
DROPPING = {name: WAYS[name] for name in ("none", "full")}
MEMORY_GOAL, TIME_GOAL = 0.5, 1.35
ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute: one round at 8,192 bytes")
    parser.add_argument("--compile", action="store_true", help="also compiled blocks, with budgets")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    chosen = parser.parse_args()
    length = 2**13 if chosen.quick else 2**16
    rounds = 1 if chosen.quick else ROUNDS
    precision = native_precisions()[-1]
    metrics = compared(WAYS, megabyte(length), precision, rounds, compiles=chosen.compile)
    metrics += compared(DROPPING, megabyte(length, dropout=0.1), precision, rounds)
    report(f"Activation checkpointing at T = {length:,}, {precision}", metrics, chosen.json)


def compared(
    ways: dict[str, CheckpointingConfig], config: ModelConfig, precision: str, rounds: int, *, compiles: bool = False
) -> list[Metric]:
    """Steps and peaks of each way, in shares of those without checkpointing."""
    engines = {name: engine_of(config, way, precision) for name, way in ways.items()}
    if compiles:
        engines["compiled"] = engine_of(config, CheckpointingConfig(), precision, compiles=True)
    times = step_times(engines, config.sequence_length, rounds)
    plain = statistics.median(times["none"])
    most = {name: peaks(config, way, compute_dtype(precision)) for name, way in ways.items()}
    metrics = []
    for name, seconds in times.items():
        most_time, most_memory = (
            (TIME_GOAL, MEMORY_GOAL) if name == "full" and not config.dropout and rounds == ROUNDS else (None, None)
        )
        title = f"dropout, {name}" if config.dropout else name
        ratio = statistics.median(own / base for own, base in zip(seconds, times["none"], strict=True))
        metrics.append(Metric(f"{title}: step", ratio, "of none's", f"none: {plain:.2f} s", most_time, "lower"))
        if name in most:
            cpu, gpu = (own / base for own, base in zip(most[name], most["none"], strict=True))
            sizes = ", ".join(f"{size / 2**20:,.0f} MiB" for size in most[name])
            detail = f"{sizes} as on a GPU: {gpu:.2f}"
            metrics.append(Metric(f"{title}: peak", cpu, "of none's", detail, most_memory, "lower"))
    return metrics


def megabyte(length: int, dropout: float = 0.0) -> ModelConfig:
    stacks = {
        "global_model": {"width": 512, "layers": 8, "heads": 8},
        "local_model": {"width": 128, "layers": 4, "heads": 2},
    }
    return model_config(
        {"family": "megabyte", "sequence_length": length, "patch_size": 32, "dropout": dropout} | stacks
    )


def engine_of(config: ModelConfig, way: CheckpointingConfig, precision: str, compiles: bool = False) -> Engine:
    how = EngineConfig(precision=precision, activation_checkpointing=way, compile=compiles)
    with torch.device("meta"):
        model = build_model(config)
    engine = build_engine(how, model, OptimizerConfig(), seed=0)
    engine.begin()
    return engine


def step_times(engines: dict[str, Engine], length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each engine's steps, which take turns; the first, which may compile, does not count."""
    content = np.random.default_rng(0).integers(0, 256, (1, length), np.uint8)
    batch = [MicroBatch(0, Rows(content, np.empty(0, np.int64), None), np.ones(content.shape, bool))]
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(1 + rounds):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.train_step(batch, step=0, learning_rate=1e-4)
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def peaks(config: ModelConfig, way: CheckpointingConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Peak bytes of activations, of this CPU and as on a GPU."""
    model = build_model(config).to(dtype)
    recompute(way, model)
    on_cpu = activations_of(model, torch.zeros(1, config.sequence_length, dtype=torch.int16))
    return on_cpu.peak, measure_activations(config, 1, dtype, way).peak


if __name__ == "__main__":
    main()
