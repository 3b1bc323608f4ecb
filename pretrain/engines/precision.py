"""Precision of the passes: its choice, and its speed on this machine.

engine.precision: auto ─▶ the precision that the run began with
                     └──▶ bf16 where this device multiplies it natively, else fp32
"""

import functools
import logging

import torch

from byteloom.core.torch_compat import cpu_capabilities
from pretrain.engines.peak import product_seconds

log = logging.getLogger(__name__)

NATIVE_SPEEDUP = 1.2
"""Least ratio of bf16 to fp32 speed of a CPU that has bf16 instructions. AVX512_BF16 reaches 2, AMX more."""
BUDGET_SECONDS = 0.05
"""Time budget of the products of a comparison. The preparation of a first product may take longer and is not counted:
it would end the comparison at small products, which are slower in bf16 on every machine."""
REPEATS = 3
"""Products of each size that are timed, after one to warm up."""
SIZES = (64, 128, 256, 512)
"""Sizes of the square products that are compared until the budget ends. Small ones are mostly overhead."""


def compute_dtype(precision: str) -> torch.dtype:
    """Return the type of parameters and activations under a precision."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}[precision]


def choose_precision(asked: str, device: torch.device, kept: str | None = None) -> str:
    """Return the precision of a start of a run, and log if another one suits the machine better.

    Args:
        asked: `engine.precision`.
        device: of the passes.
        kept: the precision of the run's earlier starts. `auto` keeps it on every machine.
    """
    if asked == "auto":
        best = "bf16" if has_native_bf16(device) else "fp32"
        if kept not in (None, best):
            log.info("precision %s is kept from the run's earlier starts; %s would be faster here", kept, best)
        asked = kept or best
    if remark := remark_on_precision(asked, device):
        log.warning("%s", remark)
    return asked


def remark_on_precision(precision: str, device: torch.device) -> str | None:
    """Return why a precision is a bad choice for a device; None if it is a good one."""
    if precision != "bf16" or has_native_bf16(device):
        return None
    return (
        f"this machine emulates bf16: products are {1 / bf16_speedup():.0f} times slower than in fp32; "
        "engine.precision=fp32 is faster"
    )


def scoring_precision(trained: str, device: torch.device) -> str:
    """Return the precision to score and generate in: the run's own, or fp32 if the device emulates that one."""
    if trained == "fp32" or has_native_bf16(device):
        return "fp32" if trained == "fp32" else "bf16"
    if trained != "auto":
        log.info("computing in fp32: this machine emulates the run's %s", trained)
    return "fp32"


def gpu_precision(asked: str) -> str:
    """Return the precision that a recipe has on a GPU, for estimates without a GPU."""
    return "bf16" if asked == "auto" else asked


def has_native_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bf16 matrices with instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = cpu_capabilities()
    if flags.get("architecture") == "x86_64" and not (flags.get("amx_bf16") or flags.get("avx512_bf16")):
        return False
    return bf16_speedup() >= NATIVE_SPEEDUP


@functools.cache
def bf16_speedup() -> float:
    """Return how many times faster this CPU multiplies matrices in bf16 than in fp32. Takes 0.1 s of a core.

    The CPU's flags alone do not decide it, because libraries can be configured to leave instructions unused.
    """
    cpu, left = torch.device("cpu"), BUDGET_SECONDS
    speedup = 1.0
    for size in SIZES:
        fp32, bf16 = (product_seconds(cpu, dtype, size, REPEATS) for dtype in (torch.float32, torch.bfloat16))
        speedup, spent = fp32 / bf16, (REPEATS + 1) * (fp32 + bf16)
        left -= spent
        if 8 * spent > left:  # the next size takes eight times as long
            break
    return speedup
