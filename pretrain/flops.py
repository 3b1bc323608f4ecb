"""Floating-point peaks, for model FLOPs utilisation (MFU)."""

import statistics
import time

import torch

DENSE_BF16_PEAK = {
    "A100": 312e12,
    "A10": 125e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""FLOP/s of dense bf16 products by device name, from the makers' data sheets (SXM where there are several)."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The device's peak FLOP/s, and where the number is from: the data sheet, or else a measurement."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        words = name.replace("-", " ").split()
        for model, peak in DENSE_BF16_PEAK.items():
            if model in words:
                return peak, f"data sheet of {model}"
    return measure_matrix_product(device, dtype), "measured 2048-cubed product"


def measure_matrix_product(device: torch.device, dtype: torch.dtype, size: int = 2048, seconds: float = 0.5) -> float:
    """FLOP/s of the median of repeated square matrix products."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)
