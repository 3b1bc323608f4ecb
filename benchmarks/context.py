"""Memory and time of a training step whose row is shared by ranks (context parallelism).

python benchmarks/context.py [--quick] [--long] [--json PATH]

Ranks are processes of one thread each, connected by gloo on this machine. A step of the engine `ddp` trains on one row
of 1 Mi bytes (`--quick`: 64 Ki) in fp32, with engine.context 1, 2 and 4 on as many ranks. The models are small, so that
nearly all memory is activations. Memory is the highest resident size of a rank in the step minus that before it; the
largest rank counts. The goal for C ranks at 1 Mi is 1/C of one rank's, and a tenth more for what ranks send and for the
ids of the whole row. Rows of `--quick` have no goal: what torch allocates once is a large part of so little memory.

`--long` takes one step of the MEGABYTE on a row of 4 Mi bytes on 4 ranks, with full activation checkpointing.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.ranks import on_ranks
from common.report import Metric, report
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Rows
from pretrain.distributed.world import World
from pretrain.engines import EngineConfig, build_engine
from pretrain.models import build_model, model_config
from pretrain.optim import OptimizerConfig

SMALL = {"width": 32, "layers": 1, "heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "megabyte": {"patch_size": 64, "global_model": SMALL | {"width": 256}, "local_model": SMALL, "dropout": 0.0},
    "transformer": SMALL | {"window": 256, "dropout": 0.0},
    "perceiver_ar": {"latents": 256, "latent_model": SMALL, "cross_heads": 2, "dropout": 0.0},
}
CONTEXTS = (1, 2, 4)
ALLOWANCE, GOAL_LENGTH = 1.1, 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute: rows of 64 Ki bytes")
    parser.add_argument("--long", action="store_true", help="one step on a row of 4 Mi bytes on 4 ranks")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    chosen = parser.parse_args()
    length = 2**22 if chosen.long else 2**16 if chosen.quick else 2**20
    metrics: list[Metric] = []
    if chosen.long:
        metrics += step_metrics("megabyte", length, (4,), checkpointing="full")
    else:
        for family in MODELS:
            metrics += step_metrics(family, length, CONTEXTS, checkpointing="none")
    report(f"Context parallelism at T = {length:,}, fp32", metrics, chosen.json)


def step_metrics(family: str, length: int, contexts: tuple[int, ...], checkpointing: str) -> list[Metric]:
    """Return the memory of each number of ranks, relative to one rank where that was measured, and the time."""
    metrics: list[Metric] = []
    alone: float | None = None
    for context in contexts:
        results = on_ranks(context, step_on_rank, family, length, context, checkpointing)
        peak = max(result["peak_bytes"] for result in results)
        seconds = max(result["seconds"] for result in results)
        detail = f"step {seconds:.1f} s, loss {results[0]['nats_per_byte']:.4f} nats per byte"
        metrics.append(Metric(f"{family}, context {context}: memory of a rank", peak / 2**20, "MiB", detail))
        if alone is not None:
            share = peak / alone
            goal = ALLOWANCE / context if length >= GOAL_LENGTH else None
            metrics.append(Metric(f"{family}, context {context} / 1: memory", share, "", "", goal, "lower"))
        alone = peak if context == 1 else alone
    return metrics


def step_on_rank(world: World, family: str, length: int, context: int, checkpointing: str) -> dict[str, Any]:
    """Return this rank's numbers of a step."""
    config = model_config({"family": family, "sequence_length": length} | MODELS[family])
    with torch.device("meta"):
        model = build_model(config)
    how = EngineConfig(device="cpu", precision="fp32", context=context, activation_checkpointing=checkpointing)
    engine = build_engine(how, model, OptimizerConfig(), seed=0, world=world)
    engine.begin()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins again
    content = np.random.default_rng(0).integers(0, 256, (1, length), np.uint8)
    row = MicroBatch(0, Rows(content, np.empty(0, np.int64), None), np.ones(content.shape, bool))
    begin = time.perf_counter()
    result = engine.train_step([row], step=0, learning_rate=1e-4)
    seconds = time.perf_counter() - begin
    return {
        "peak_bytes": memory("VmHWM") - before,
        "seconds": seconds,
        "nats_per_byte": result.nats / result.target_bytes,
    }


def memory(name: str) -> int:
    """Return a size of this process in bytes, as Linux names it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
