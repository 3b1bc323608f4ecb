"""The output of `byteloom --version`: the versions that results and speed depend on.

Only torch is imported, because it knows the accelerator. It may be missing or broken.
"""

import platform
from collections import Counter

import typer

from byteloom.core.packages import installed_version

INSTRUCTIONS = {"avx512_bf16": "AVX512_BF16", "amx_bf16": "AMX"}
"""CPU instructions that multiply bf16: torch's names and the vendors' names."""


def print_versions() -> None:
    """Print the versions, a line each."""
    byteloom, torch, deepspeed = (
        installed_version(name) or "not installed" for name in ("byteloom", "torch", "deepspeed")
    )
    lines = {
        "byteloom": byteloom,
        "Python": platform.python_version(),
        "torch": torch,
        "deepspeed": deepspeed,
        "accelerator": describe_accelerator(),
    }
    for name, value in lines.items():
        typer.echo(f"{name:12} {value}")


def describe_accelerator() -> str:
    """Return the accelerator: version of CUDA or ROCm and its devices, or the CPU and its instructions."""
    try:
        import torch  # noqa: PLC0415 - takes two seconds

        from byteloom.core.torch_compat import cpu_capabilities  # noqa: PLC0415 - imports torch
    except (ImportError, OSError) as error:
        return f"unknown: torch cannot be imported ({str(error).partition(chr(10))[0]})"
    if torch.cuda.is_available():
        platform_version = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        devices = Counter(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return f"{platform_version}, {', '.join(f'{count} x {name}' for name, count in devices.items())}"
    capabilities = cpu_capabilities()
    bf16 = [name for flag, name in INSTRUCTIONS.items() if capabilities.get(flag)]
    built = f"; torch is built for CUDA {torch.version.cuda} and finds no device" if torch.version.cuda else ""
    return f"CPU with {', '.join([torch.backends.cpu.get_cpu_capability(), *bf16])}{built}"
