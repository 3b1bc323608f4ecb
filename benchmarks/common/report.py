"""Shared parts of the benchmarks: options, a table, and a JSON list of metrics."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pretrain.engines import has_native_bf16
from pretrain.terminal.tables import Table


@dataclass(frozen=True)
class Metric:
    metric: str
    value: float
    unit: str
    detail: str
    goal: float | None = None
    better: str = "higher"

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        met = self.value >= self.goal if self.better == "higher" else self.value <= self.goal
        return f"{'met' if met else 'MISSED'} ({'at least' if self.better == 'higher' else 'at most'} {self.goal:g})"


def options(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="end within a minute, with fewer rounds")
    parser.add_argument("--json", type=Path, help="write the metrics here as well")
    return parser.parse_args()


def native_precisions() -> tuple[str, ...]:
    """Return the precisions that this CPU has instructions for, the fastest last; print which is skipped."""
    if has_native_bf16(torch.device("cpu")):
        return ("fp32", "bf16")
    print("bf16 is skipped: this CPU emulates it", file=sys.stderr)
    return ("fp32",)


def interleaved(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each function, run in turn so that a change of the machine's speed affects all."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for function in work.values():
        function()
    for _ in range(rounds):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(title: str, metrics: list[Metric], path: Path | None) -> None:
    """Print a table and write the JSON list."""
    table = Table(title, ["metric", "value", "unit", "goal", "detail"], numbers=["value"])
    for metric in metrics:
        table.add_row(metric.metric, f"{metric.value:.3g}", metric.unit, metric.verdict, metric.detail)
    table.print()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    if path is not None:
        path.write_text(json.dumps([asdict(metric) for metric in metrics], indent=1), encoding="utf-8")


def in_turn(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of the processor of each function, run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name, function in work.items():
            begin = time.process_time()
            function()
            if number:  # the first call allocates
                seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}
