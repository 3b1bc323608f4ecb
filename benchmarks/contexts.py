"""Context, memory and time at equal layers: Transformer, Transformer-XL, Perceiver AR and MEGABYTE.

python benchmarks/contexts.py [--quick] [--json PATH] [--plot PATH]

Perceiver AR's main claim (arXiv:2202.07765): its context grows while its layers do not. Each model has LAYERS layers of
one width; Perceiver AR has one cross-attend more, and MEGABYTE halves its layers between its two models.

    memory   the longest power of two whose training step of one row in fp32 fits a budget: weights, gradients, moments
             and activations. Activations are those of torch's meta device, as `byteloom models estimate` measures them
    time     the second of two steps of one row of random bytes in fp32, one thread, on this CPU: by the clock, and in
             seconds of the processor, which other programs disturb less. Each runs in a process of its own, whose
             peak of resident memory, without imports, is measured too

The Transformer-XL reads its row at once, with a memory of as many positions. Matplotlib comes with mlflow.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure

from common.batch import random_batch
from common.contender import resident_bytes
from common.report import Metric, report
from pretrain.engines import EngineConfig, build_engine
from pretrain.estimate.activations import measure_activations, on_meta
from pretrain.models import build_model, model_config
from pretrain.optim import OptimizerConfig

LAYERS, WIDTH, HEADS, LATENTS, PATCH = 6, 128, 4, 256, 8
STACK = {"layers": LAYERS, "width": WIDTH, "heads": HEADS}
HALF = STACK | {"layers": LAYERS // 2}
MODELS: dict[str, dict[str, Any]] = {
    "Transformer": {"family": "transformer", **STACK},
    "Transformer-XL": {"family": "transformer_xl", **STACK},
    "Perceiver AR": {"family": "perceiver_ar", "latents": LATENTS, "latent_model": STACK, "cross_heads": HEADS},
    "MEGABYTE": {"family": "megabyte", "patch_size": PATCH, "global_model": HALF, "local_model": HALF},
}
BUDGETS = [2**n for n in range(-2, 4)]
"""GiB."""
LENGTHS = [2**n for n in range(9, 13)]
SHORTEST, LONGEST = 2**8, 2**20
STATE_BYTES = 16
"""Bytes of fp32 weight, gradient and moments of a parameter."""


class Step(NamedTuple):
    """Measured cost of a training step."""

    length: int
    clock: float
    """Seconds."""
    processor: float
    """Seconds."""
    peak: int
    """Bytes that the process held at most, without imports."""


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="time contexts up to 2,048 bytes only")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    parser.add_argument("--plot", type=Path, help="write the plot as PNG here")
    chosen = parser.parse_args()
    fits = {name: [longest_within(name, budget * 2**30) for budget in BUDGETS] for name in MODELS}
    times: dict[str, list[Step]] = {name: [] for name in MODELS}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as own_process:
        for length in LENGTHS[:3] if chosen.quick else LENGTHS:
            for name in MODELS:  # in turn, so that a change of the machine's speed affects all
                times[name].append(own_process.submit(measured, name, length).result())
    metrics = [
        Metric(f"{name}, {budget:g} GiB", fit, "bytes of context", "memory")
        for name, found in fits.items()
        for budget, fit in zip(BUDGETS, found, strict=True)
    ]
    metrics += [
        Metric(
            f"{name}, T = {step.length:,}",
            step.processor,
            "s of the processor",
            f"{step.clock:.2f} s by the clock, {step.peak / 2**20:.0f} MiB",
        )
        for name, found in times.items()
        for step in found
    ]
    report("Context at equal layers", metrics, chosen.json)
    if chosen.plot:
        plot(fits, times, chosen.plot)


def config_of(name: str, length: int) -> Any:
    """Return the config of a model with a context."""
    fields = {"sequence_length": length, "dropout": 0.0}
    if name == "Transformer-XL":
        fields["memory_length"] = length
    if name == "Perceiver AR":
        fields |= {"latents": min(LATENTS, length), "cross_attend_dropout": 0.0}
    return model_config({**MODELS[name], **fields})


@cache
def step_bytes(name: str, length: int) -> int:
    """Return the peak memory of a training step of one row in fp32."""
    config = config_of(name, length)
    return STATE_BYTES * on_meta(config).parameter_count() + measure_activations(config, 1, torch.float32).peak


def longest_within(name: str, budget: float) -> int:
    """Return the longest power of two that fits a budget of bytes; 0 if none does."""
    length = SHORTEST
    while length <= LONGEST and step_bytes(name, length) <= budget:
        length *= 2
    return length // 2 if length > SHORTEST else 0


def measured(name: str, length: int) -> Step:
    """Return the cost of a step. This process has taken none before."""
    torch.set_num_threads(1)
    before = resident_bytes()
    model = build_model(config_of(name, length))
    engine = build_engine(EngineConfig.model_validate({"precision": "fp32"}), model, OptimizerConfig(), seed=0)
    batch = random_batch(1, length)
    for _ in range(2):
        clock, processor = time.perf_counter(), time.process_time()
        engine.train_step(batch, step=0, learning_rate=1e-4)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    print(f"{name}, T = {length:,}: {processor:.2f} s of the processor", file=sys.stderr)
    return Step(length, clock, processor, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def plot(fits: dict[str, list[int]], times: dict[str, list[Step]], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    memory_axis, time_axis = figure.subplots(1, 2)
    for name in MODELS:
        memory_axis.plot(BUDGETS, fits[name], "o-", label=name)
        time_axis.plot(
            [step.length for step in times[name]], [step.processor for step in times[name]], "o-", label=name
        )
    memory_axis.set(xlabel="memory (GiB)", ylabel="longest context (bytes)")
    time_axis.set(xlabel="context (bytes)", ylabel="seconds of the processor a step")
    for axis in (memory_axis, time_axis):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
