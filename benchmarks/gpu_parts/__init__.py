"""Parts of gpu.py: what each measures, and what all of them share."""

import gc
import importlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from byteloom.core.provenance import driver_version

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """A measurement, or a check."""

    name: str
    value: float | None
    unit: str = ""
    detail: str = ""
    is_right: bool | None = None
    """Result of a check; None for a measurement."""

    def __str__(self) -> str:
        value = "" if self.value is None else f" {self.value:.4g} {self.unit}"
        verdict = {None: "", True: ", right", False: ", WRONG"}[self.is_right]
        return f"{self.name}:{value}{verdict}{f' ({self.detail})' if self.detail else ''}"


@dataclass(frozen=True)
class Setting:
    """Device of the measurements, their size, and the folder of their results."""

    device: torch.device
    toy: bool
    folder: Path

    @classmethod
    def of(cls, device: str | None, folder: Path, *, toy: bool) -> Self:
        """Return the setting of options; a CPU has toy sizes."""
        name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(torch.device(name), toy or name == "cpu", folder)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: Any, toy: Any) -> Any:
        """Return the value for the size of the measurements."""
        return toy if self.toy else full

    def versions(self) -> dict[str, str]:
        """Return what results depend on."""
        found = {
            "device": torch.cuda.get_device_name(self.device) if self.is_cuda else platform.machine(),
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "commit": _commit(),
            "sizes": "toy" if self.toy else "full",
        }
        if self.is_cuda:
            found |= {
                "CUDA": str(torch.version.cuda),
                "cuDNN": str(torch.backends.cudnn.version()),
                "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
                "driver": driver_version(),
            }
        return found

    def set_up(self) -> None:
        """Set what engines set for the process: fp32 without TF32, and the allocator."""
        if self.is_cuda:
            from pretrain.engines.process_state import set_up_cuda  # noqa: PLC0415 - the parent process needs no engine

            set_up_cuda(deterministic=False)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def free_memory(self) -> None:
        """Free what a part has left, and forget its peak."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, work: Callable[[], object], *, rounds: int = 5, calls: int = 1) -> float:
        """Return the median seconds of a call, over rounds of several calls, after a first one that does not count."""
        work()
        times = []
        for _ in range(self.pick(rounds, 1)):
            self.synchronize()
            begin = time.perf_counter()
            for _ in range(self.pick(calls, 1)):
                work()
            self.synchronize()
            times.append((time.perf_counter() - begin) / self.pick(calls, 1))
        return statistics.median(times)


@dataclass(frozen=True)
class Part:
    """A part of the benchmark."""

    module: str
    """File of this folder."""
    title: str
    seconds: int
    """Time that it is planned to take on one H200."""
    needs: tuple[str, ...] = ()
    """Packages that it needs besides torch, numpy, pydantic and pyyaml."""
    needs_gpu: bool = False

    def run(self, setting: Setting) -> Iterator[Row]:
        """Yield the measurements."""
        rows: Iterator[Row] = importlib.import_module(f"gpu_parts.{self.module}").rows(setting)
        return rows


PARTS = {
    "machine": Part("machine", "versions, and peaks of products and copies", 20),
    "agreement": Part("agreement", "families, attention and decoding against the CPU; activation checkpointing", 70),
    "waits": Part("waits", "no operation of a step waits for the device", 20),
    "resume": Part("resume", "20 steps against 10 and 10 resumed, with default and with deterministic kernels", 40),
    "saving": Part("saving", "a checkpoint while steps continue: stall, pinned memory, load", 60),
    "speed": Part("speed", "megabyte/pg19-best by micro-batch, eager and compiled", 120),
    "memory": Part("memory", "the estimate of memory against what is allocated", 60),
    "kernels": Part("kernels", "ways to compute the same, side by side", 80),
    "mamba": Part(
        "mamba",
        "Mamba-2: the kernels of mamba-ssm and causal-conv1d against plain torch",
        30,
        needs=("mamba_ssm", "causal_conv1d"),
        needs_gpu=True,
    ),
    "recipes": Part("recipes", "Perceiver AR and Transformer-XL", 60),
    "limits": Part("limits", "out of memory", 20, needs_gpu=True),
    "sharded": Part("sharded", "FSDP2 of one rank, with and without offload", 20),
    "command": Part(
        "command",
        "byteloom prepare and byteloom train",
        60,
        needs=("zstandard", "blake3", "tenacity", "typer", "rich", "safetensors"),
    ),
}
"""Parts by name, in the order in which they run."""


def _commit() -> str:
    """Return the commit of the source tree, with a mark if files differ from it; "unknown" outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
