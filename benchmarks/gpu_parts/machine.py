"""Part machine: peaks of products and copies, beside the data sheet."""

from collections.abc import Iterator

import torch

from gpu_parts import Row, Setting
from pretrain.engines.peak import DENSE_BF16_PEAK, measure_peak


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the fastest products by precision, and the speed of copies."""
    device, seconds = setting.device, setting.pick(2.0, 0.02)
    bf16 = measure_peak(device, torch.bfloat16, seconds)
    name = torch.cuda.get_device_name(device).replace("-", " ").split() if setting.is_cuda else []
    sheet = next((peak for model, peak in DENSE_BF16_PEAK.items() if model in name), None)
    share = f"{bf16 / sheet:.0%} of the data sheet's {sheet / 1e12:.0f}" if sheet else ""
    yield Row("product, bf16", bf16 / 1e12, "TFLOP/s", share)
    for precision in ("tf32", "ieee"):  # the last one stays
        torch.backends.cuda.matmul.fp32_precision = precision
        yield Row(f"product, fp32, {precision}", measure_peak(device, torch.float32, seconds) / 1e12, "TFLOP/s")
    size = setting.pick(1 << 30, 1 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = setting.seconds(lambda: target.copy_(source), calls=10)
    yield Row("copy on the device, read and written", 2 * size / copied / 1e9, "GB/s")
    host = torch.empty(size, dtype=torch.uint8, pin_memory=setting.is_cuda)
    for title, copy in (
        ("copy from pinned memory", lambda: target.copy_(host, non_blocking=True)),
        ("copy to pinned memory", lambda: host.copy_(target, non_blocking=True)),
    ):
        yield Row(title, size / setting.seconds(copy, calls=5) / 1e9, "GB/s")
