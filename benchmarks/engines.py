"""Comparison of the engines with each other and with a loop without an engine: memory of a rank, and time of a step.

python benchmarks/engines.py [--quick] [--json PATH]

Ranks are processes with one thread each, connected by gloo on this machine. The model is that of
configs/megabyte/books-10m.yaml. For memory it is half as wide and in bf16. For time it is in bf16, or in fp32 if the
CPU emulates bf16.

Memory, on 4 ranks: the bytes of all tensors that exist on a rank between backward and the update (masters, moments,
gradients, copies, and whatever an engine left unsharded), minus those that existed before the engine was built. The
largest rank counts. docs/guides/engines.md gives the theory.

Time, on 1 and 2 ranks: each rank takes a step of 4 rows of 1,024 bytes (`--quick`: 1 row, 3 rounds) with every
contender in turn, in another order each round, after a barrier. The time of a step is that of the slowest rank. `bare`
is a loop with the same mathematics that uses only the model of Byteloom: `BareLoop` below. A ratio is the median over
the ratios of each round. If other work shares the machine, the ratio of CPU times is more reliable than that of
wall-clock times.
"""

import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common.ranks import on_ranks
from common.report import Metric, native_precisions, options, report
from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Rows
from pretrain.config.loading import load
from pretrain.config.schema import Config
from pretrain.distributed.world import ALONE, World
from pretrain.engines import Engine, EngineError, StepResult, build_engine, compute_dtype
from pretrain.models import ByteModel, build_model

RECIPE = Path(__file__).parents[1] / "configs/megabyte/books-10m.yaml"
MEMORY_RANKS, TIME_RANKS, ROWS = 4, 2, 4
SMALLER = [
    "engine.precision=bf16",
    "model.sequence_length=64",
    "model.global_model.width=256",
    "model.local_model.width=64",
]
ENGINES = {
    "ddp": ["engine.name=ddp"],
    "fsdp": ["engine.name=fsdp"],
    "fsdp, kept": ["engine.name=fsdp", "engine.reshard_after_forward=false"],
    "hsdp of 2": ["engine.name=hsdp", "engine.shards=2"],
    "zero1": ["engine.name=zero1"],
    "zero2": ["engine.name=zero2"],
    "zero3": ["engine.name=zero3"],
    "zero3, no bucket": ["engine.name=zero3", "engine.deepspeed={zero_optimization: {reduce_bucket_size: 1024}}"],
}
BYTES_PER_PARAMETER: dict[str, Callable[[int], float]] = {
    "ddp": lambda ranks: 16,
    "fsdp": lambda ranks: 16 / ranks,
    "fsdp, kept": lambda ranks: 16 / ranks,
    "hsdp of 2": lambda ranks: 16 / 2,
    "zero1": lambda ranks: 2 + 4 + 12 / ranks,
    "zero2": lambda ranks: 2 + (4 + 12) / ranks,
    "zero3": lambda ranks: (2 + 4 + 12) / ranks,
    "zero3, no bucket": lambda ranks: (2 + 4 + 12) / ranks,
}
"""Theoretical bytes per parameter between backward and the update, in bf16: 4 for gradients, 4 for masters, 8 for
moments, and with ZeRO 2 for weights. DeepSpeed's buffer for gradients, a block of the model in fp32, is not in the
theory but stays allocated. Without a bucket only the states are left."""


def main() -> None:
    chosen = options(__doc__)
    rounds, rows = (3, 1) if chosen.quick else (25, ROWS)
    precision = native_precisions()[-1]
    metrics = memory_metrics(on_ranks(MEMORY_RANKS, memory_on_rank))
    for ranks in (1, TIME_RANKS):
        metrics += time_metrics(on_ranks(ranks, times_on_rank, rounds, precision, rows))
    report(f"Engines; times in {precision}", metrics, chosen.json)


def memory_metrics(results: list[dict[str, Any]]) -> list[Metric]:
    """Return the metrics of memory from the results of all ranks."""
    parameters, alone = results[0].pop("parameters"), results[0].pop("one process")
    metrics = [Metric("one process: state", alone / 2**20, "MiB", f"{alone / parameters:.2f} bytes per parameter")]
    for name, own in results[0].items():
        title = f"{name} of {len(results)}"
        if isinstance(own, str):
            print(f"{title} is skipped: {own}")
            continue
        held = max(result[name] for result in results)
        theory = BYTES_PER_PARAMETER[name](len(results))
        detail = f"{held / parameters:.2f} bytes per parameter; theory {theory:g}"
        metrics.append(Metric(f"{title}: state / one process", held / alone, "", detail))
        goal = 1.1 if name in ("fsdp", "zero3, no bucket") else None
        metrics.append(Metric(f"{title}: state / theory", held / parameters / theory, "", "", goal, "lower"))
    return metrics


def time_metrics(results: list[dict[str, Any]]) -> list[Metric]:
    """Return the metrics of time from the results of all ranks."""
    ranks = f"{len(results)} ranks" if len(results) > 1 else "one process"
    seconds, cpu_seconds = (
        {
            name: [max(times) for times in zip(*(result[name][kind] for result in results), strict=True)]
            for name in results[0]
        }
        for kind in ("seconds", "cpu_seconds")
    )
    metrics = []
    for name, own in results[0].items():
        metrics.append(Metric(f"{ranks}, {name}: step", statistics.median(seconds[name]) * 1e3, "ms", own["phases"]))
        if name != "bare":
            goal = 1.03 if name == "ddp" else None
            for title, times in ((f"{name} / bare", seconds), (f"{name} / bare, CPU time", cpu_seconds)):
                ratios = [ours / bare for ours, bare in zip(times[name], times["bare"], strict=True)]
                first, _, third = statistics.quantiles(ratios)
                spread = f"quartiles {first:.3f} and {third:.3f}"
                metrics.append(Metric(f"{ranks}, {title}", statistics.median(ratios), "", spread, goal, "lower"))
    return metrics


def memory_on_rank(world: World) -> dict[str, Any]:
    """Return the bytes of each engine's tensors on this rank, or why the engine cannot be built."""
    found: list[int] = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: found.append(live_bytes(optimizer)))
    results: dict[str, Any] = {"parameters": seeded_model(load(RECIPE, SMALLER)).parameter_count()}
    for name, overrides in {"one process": [], **ENGINES}.items():
        place = ALONE if name == "one process" else world
        gc.collect()
        before = live_bytes()
        engine = engine_of([*SMALLER, *overrides], place, rows=1)
        if not isinstance(engine, str):
            for step in range(2):  # DDP rebuilds its buckets after the first step
                engine.train_step(batch(place, 1, 64), step=step, learning_rate=1e-4)
        results[name] = engine if isinstance(engine, str) else found[-1] - before
        del engine
    handle.remove()
    return results


def times_on_rank(world: World, rounds: int, precision: str, rows: int) -> dict[str, Any]:
    """Return this rank's wall-clock and CPU seconds of each contender's steps, and their phases."""
    config = load(RECIPE, [f"engine.precision={precision}"])
    bare = BareLoop(seeded_model(config), config, world)
    micro_batches = batch(world, rows, config.model.sequence_length)
    ids = torch.from_numpy(micro_batches[0].ids)
    work: dict[str, Callable[[], Any]] = {"bare": lambda: bare.step(ids)}
    for name, overrides in ENGINES.items():
        if name in ("hsdp of 2", "zero3, no bucket") or (world.size == 1 and name != "ddp"):
            continue  # one process has no peers, groups of 2 are all of 2 ranks, and buckets are needed for speed
        engine = engine_of([f"engine.precision={precision}", *overrides], world, rows)
        if not isinstance(engine, str):
            work[name] = partial(engine.train_step, micro_batches, step=0, learning_rate=1e-4)
    for function in work.values():
        function()
        function()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in work}
    results: dict[str, list[Any]] = {name: [] for name in work}
    names = list(work)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if world.size > 1:
                dist.barrier()
            begin, cpu_begin = time.perf_counter(), time.process_time()
            results[name].append(work[name]())
            seconds[name].append(time.perf_counter() - begin)
            cpu_seconds[name].append(time.process_time() - cpu_begin)
    check_same_work(results)
    return {
        name: {
            "seconds": seconds[name],
            "cpu_seconds": cpu_seconds[name],
            "phases": describe(results[name], world.rank),
        }
        for name in work
    }


class BareLoop:
    """Training loop in plain PyTorch: cast in the graph, DDP on several ranks, clipping, fused AdamW in fp32."""

    def __init__(self, model: ByteModel, config: Config, world: World) -> None:
        self._module: nn.Module = _InPrecision(model, compute_dtype(config.engine.precision))
        if world.size > 1:
            self._module = DistributedDataParallel(self._module, gradient_as_bucket_view=True)
        self._parameters = list(model.parameters())
        adam = config.optimizer
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=1e-4,
            betas=(adam.beta1, adam.beta2),
            eps=adam.epsilon,
            weight_decay=adam.decay,
            fused=True,
        )

    def step(self, ids: Tensor) -> float:
        """Take a step and return this rank's nats per byte."""
        loss = self._module(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


class _InPrecision(nn.Module):
    def __init__(self, model: ByteModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        copies = {name: parameter.to(self.dtype) for name, parameter in self.model.named_parameters()}
        return functional_call(self.model, copies, (ids,)).mean()


def check_same_work(results: dict[str, list[Any]]) -> None:
    """Check that the last losses agree, because all contenders learn the same rows."""
    for name, own_results in results.items():
        if name == "bare":
            continue
        last: StepResult = own_results[-1]
        loss = last.nats / last.target_bytes
        assert abs(loss / results["bare"][-1] - 1) < 0.05, (name, loss, results["bare"][-1])


def describe(results: list[Any], rank: int) -> str:
    if not isinstance(results[0], StepResult):
        return ""
    own = [result.ranks[rank] for result in results]
    phases = {
        "forward and backward": [each.forward_backward for each in own],
        "optimizer": [each.optimizer for each in own],
        "communication": [each.communication for each in own],
    }
    return ", ".join(f"{name} {statistics.median(times) * 1e3:.1f}" for name, times in phases.items())


def seeded_model(config: Config) -> ByteModel:
    """Return the recipe's model, the same on all ranks."""
    torch.manual_seed(0)
    return build_model(config.model)


def engine_of(overrides: list[str], world: World, rows: int) -> Engine | str:
    """Return an engine, or why it cannot be built."""
    config = load(RECIPE, overrides)
    try:
        return build_engine(
            config.engine,
            seeded_model(config),
            config.optimizer,
            seed=0,
            world=world,
            global_batch=rows * world.size,
            micro_batch=rows,
        )
    except EngineError as error:
        return str(error)


def batch(world: World, rows: int, length: int) -> list[MicroBatch]:
    """Return the same rows on each rank, so that all ranks have the same loss."""
    content = np.random.default_rng(0).integers(0, 256, (rows, length), np.uint8)
    return [MicroBatch(world.rank, Rows(content, np.empty(0, np.int64), None), np.ones(content.shape, bool))]


def live_bytes(optimizer: torch.optim.Optimizer | None = None) -> int:
    """Return the bytes of all tensors that the garbage collector knows, and of an optimizer's gradients."""
    groups = optimizer.param_groups if optimizer is not None else []
    gradients = [parameter.grad for group in groups for parameter in group["params"]]
    tensors = [candidate for candidate in gc.get_objects() if type(candidate) in (Tensor, nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    storages.pop(0, None)
    del gradients
    return sum(storages.values())


if __name__ == "__main__":
    main()
