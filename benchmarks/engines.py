"""Comparison of the engines with each other and with a loop without an engine: memory of a rank, and time of a step.

python benchmarks/engines.py [--quick] [--json PATH]

Ranks are processes with one thread each, connected by gloo on this machine. The model is that of
configs/megabyte/books-10m.yaml. For memory it is half as wide and in bf16. For time it is in bf16, or in fp32 if the
CPU emulates bf16.

Memory, on 4 ranks: the bytes of all tensors that exist on a rank between backward and the update (masters, moments,
gradients, copies, and whatever an engine left unsharded), minus those that existed before the engine was built. The
largest rank counts. docs/guides/training/engines.md gives the theory.

Time, on 1 and 2 ranks: a step of 4 rows of 1,024 bytes on each rank (`--quick`: 1 row). `bare` is a loop with the same
mathematics that uses only the model of Byteloom: `BareLoop` below. A round is two steps of an engine between two of
`bare`, so that a machine that becomes slower or faster slows or speeds up both. A ratio is the median over the rounds,
with the interval that holds the median with a probability of 95 %. CPU time is that of all threads of all ranks. Other
work on the machine changes it less than wall-clock time, which is that of the slowest rank and includes waits.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
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
from pretrain.engines import Engine, EngineError, StepResult, Upcoming, build_engine, compute_dtype
from pretrain.models import ByteModel, build_model

RECIPE = Path(__file__).parents[1] / "configs/megabyte/books-10m.yaml"
MEMORY_RANKS, TIME_RANKS, ROWS = 4, 2, 4
ROUNDS = {False: (50, 25), True: (30, 3)}
"""Rounds of ddp and of each other engine, without and with --quick."""
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
    rows = 1 if chosen.quick else ROWS
    precision = native_precisions()[-1]
    metrics = memory_metrics(on_ranks(MEMORY_RANKS, memory_on_rank))
    for ranks in (1, TIME_RANKS):
        metrics += time_metrics(on_ranks(ranks, times_on_rank, precision, rows, chosen.quick))
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
    metrics = []
    for name, own in results[0].items():
        rounds = [
            Round.of_all(*of_ranks) for of_ranks in zip(*(result[name]["rounds"] for result in results), strict=True)
        ]
        step = statistics.median(each.seconds[0] for each in rounds) / 2
        bare = statistics.median(each.seconds[1] for each in rounds) / 2
        metrics.append(Metric(f"{ranks}, {name}: step", step * 1e3, "ms", f"bare {bare * 1e3:.1f}, {own['phases']}"))
        goal = 1.03 if name == "ddp" else None
        for kind, title in (("cpu_seconds", "CPU time"), ("seconds", "wall-clock time")):
            ratios = sorted(ours / bare for ours, bare in (getattr(each, kind) for each in rounds))
            metrics.append(
                Metric(
                    f"{ranks}, {name} / bare, {title}", statistics.median(ratios), "", interval(ratios), goal, "lower"
                )
            )
    return metrics


def interval(ordered: list[float]) -> str:
    """Return the interval that holds the median of a distribution with 95 %, by the order of independent draws."""
    draws = len(ordered)
    first = max(0, math.floor(draws / 2 - 0.98 * math.sqrt(draws)))
    return f"{ordered[first]:.3f} to {ordered[draws - 1 - first]:.3f}, {draws} rounds"


@dataclass(frozen=True)
class Round:
    """Two steps of an engine, and two of the bare loop."""

    seconds: tuple[float, float]
    """Wall-clock time of the engine's steps, and of the bare ones."""
    cpu_seconds: tuple[float, float]

    @classmethod
    def of_steps(cls, *steps: tuple[float, float]) -> "Round":
        """Return the round of the wall-clock and CPU seconds of a bare step, two of an engine and a bare one."""
        first, second, third, last = steps
        return cls(*((second[i] + third[i], first[i] + last[i]) for i in range(2)))

    @classmethod
    def of_all(cls, *ranks: "Round") -> "Round":
        """Return the round of all ranks: the time of the slowest, and the CPU time of all."""
        slowest = [max(each.seconds[i] for each in ranks) for i in range(2)]
        work = [sum(each.cpu_seconds[i] for each in ranks) for i in range(2)]
        return cls((slowest[0], slowest[1]), (work[0], work[1]))


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


def times_on_rank(world: World, precision: str, rows: int, quick: bool) -> dict[str, Any]:
    """Return the rounds of each engine on this rank, and the phases of its steps."""
    config = load(RECIPE, [f"engine.precision={precision}"])
    bare = BareLoop(seeded_model(config), config, world)
    micro_batches = batch(world, rows, config.model.sequence_length)
    ids = torch.from_numpy(micro_batches[0].ids)
    work: dict[str, Callable[[], StepResult]] = {}
    for name, overrides in ENGINES.items():
        if name in ("hsdp of 2", "zero3, no bucket") or (world.size == 1 and name != "ddp"):
            continue  # one process has no peers, groups of 2 are all of 2 ranks, and buckets are needed for speed
        engine = engine_of([f"engine.precision={precision}", *overrides], world, rows)
        if not isinstance(engine, str):
            work[name] = partial(step_of, engine, micro_batches, count())
    results: dict[str, list[StepResult]] = {name: [function(), function()] for name, function in work.items()}
    losses = [bare.step(ids), bare.step(ids)]
    rounds: dict[str, list[Round]] = {name: [] for name in work}
    for number in range(max(ROUNDS[quick])):
        for name, function in work.items():
            if number < ROUNDS[quick][name != "ddp"]:
                steps = (
                    timed(world, lambda: losses.append(bare.step(ids))),
                    *(timed(world, lambda own=results[name], take=function: own.append(take())) for _ in range(2)),
                    timed(world, lambda: losses.append(bare.step(ids))),
                )
                rounds[name].append(Round.of_steps(*steps))
    check_same_work(results, losses)
    return {name: {"rounds": rounds[name], "phases": describe(results[name], world.rank)} for name in work}


def timed(world: World, function: Callable[[], object]) -> tuple[float, float]:
    """Return the wall-clock and the CPU seconds of a call that all ranks begin together."""
    if world.size > 1:
        dist.barrier()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - begin, time.process_time() - cpu_begin


def step_of(engine: Engine, micro_batches: list[MicroBatch], steps: Iterator[int]) -> StepResult:
    """Take a step as the training loop does."""
    look_ahead = partial(Upcoming, micro_batches, (0.0,) * 6) if dist.is_initialized() else None
    return engine.train_step(micro_batches, step=next(steps), learning_rate=1e-4, look_ahead=look_ahead)


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


def check_same_work(results: dict[str, list[StepResult]], losses: list[float]) -> None:
    """Check that an engine's last loss is that of the bare loop in this step, because both learn the same rows."""
    for name, own_results in results.items():
        last, bare = own_results[-1], losses[len(own_results) - 1]
        assert abs(last.nats / last.target_bytes / bare - 1) < 0.05, (name, last.nats / last.target_bytes, bare)


def describe(results: list[StepResult], rank: int) -> str:
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
