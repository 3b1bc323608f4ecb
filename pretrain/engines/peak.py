"""Peak floating-point rates of devices, for model FLOPs utilisation (MFU)."""

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from byteloom.core.storage.files import replace_file
from byteloom.core.storage.locations import user_cache
from byteloom.core.torch_compat import cpu_capabilities

log = logging.getLogger(__name__)

DENSE_BF16_PEAK = {
    "A100": 312e12,
    "A10": 125e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""FLOP/s of dense bf16 products by device name, from data sheets (SXM if there are several variants)."""
PEAK_SECONDS = 0.2
"""Time budget of a measured peak."""
PRODUCT_SECONDS = 0.02
"""Intended time of one product of a measurement."""
TRIAL_SIZE, LARGEST_SIZE = 128, 8192
"""Sizes of square products: the first one, and the largest."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the device's peak in FLOP/s, and its source: the data sheet, or else a measurement.

    A measurement is stored in the user's cache folder, so that each kind of machine is measured once per type.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        words = torch.cuda.get_device_name(device).replace("-", " ").split()
        for model, peak in DENSE_BF16_PEAK.items():
            if model in words:
                return peak, f"data sheet of {model}"
    path = user_cache() / "peaks.json"
    key = f"{dtype}, {_describe_machine(device)}"
    known = _read_peaks(path)
    if key not in known:
        known[key] = measure_peak(device, dtype)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(known, indent=1))
        except OSError as error:  # the cache is not writable: measure again next time
            log.debug("cannot store the measured peak in %s: %s", path, error)
    return known[key], "measured matrix product"


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = PEAK_SECONDS) -> float:
    """Return the highest FLOP/s of square matrix products within a time budget."""
    end = time.perf_counter() + seconds
    rate = 2 * TRIAL_SIZE**3 / product_seconds(device, dtype, TRIAL_SIZE, repeats=3)
    if device.type == "cpu":
        rate *= torch.get_num_threads()
    size = max(TRIAL_SIZE, min(int((rate * PRODUCT_SECONDS / 2) ** (1 / 3)) // 64 * 64, LARGEST_SIZE))
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    shortest = _time_product(a, b)
    while time.perf_counter() + shortest < end:
        shortest = min(shortest, _time_product(a, b))
    return 2 * size**3 / shortest


def product_seconds(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Return the shortest time of a square matrix product, after one to warm up; on a CPU by one thread.

    There it is the thread's own time, which does not grow while other processes have the core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        clock = time.perf_counter if device.type == "cuda" else time.thread_time
        _time_product(a, b, clock)
        return min(_time_product(a, b, clock) for _ in range(repeats))
    finally:
        torch.set_num_threads(threads)


def _time_product(a: Tensor, b: Tensor, clock: Callable[[], float] = time.perf_counter) -> float:
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    start = clock()
    torch.mm(a, b)
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    return clock() - start


def _describe_machine(device: torch.device) -> str:
    """Return what a measured peak depends on: the device, its threads, and the instructions of its libraries."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    limits = [f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA") if name in os.environ]
    name, capability = cpu_capabilities().get("cpu_name", platform.machine()), torch.backends.cpu.get_cpu_capability()
    return ", ".join([name, capability, f"{torch.get_num_threads()} threads", f"torch {torch.__version__}", *limits])


def _read_peaks(path: Path) -> dict[str, float]:
    """Return earlier measurements; none if the file is missing or damaged."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: peak for key, peak in known.items() if isinstance(peak, float) and 0 < peak < float("inf")}
