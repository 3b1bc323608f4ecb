"""A CPU that emulates bf16, on any machine: libraries are told to leave its instructions unused."""

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

SLOW = 5
"""How many times slower than in fp32 a product in bf16 is, at the least, where bf16 is emulated."""
SPEEDUP = """
import time, torch
def seconds(dtype):
    a, times = torch.randn(256, 256).to(dtype), []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return min(times)
torch.set_num_threads(1)
print(seconds(torch.float32) / seconds(torch.bfloat16))
"""


@dataclass(frozen=True)
class Emulation:
    """A way to keep torch from the CPU's bf16 instructions."""

    variables: Mapping[str, str] = field(default_factory=dict)
    preamble: str = ""
    """Python code that runs before all else."""

    def command(self, *arguments: object) -> list[str]:
        """Return a command line of `byteloom` under this emulation, for `environment()`."""
        code = f"{self.preamble}\nfrom pretrain.cli.entry import main; main()"
        return [sys.executable, "-c", code, *map(str, arguments)]

    def python(self, code: str) -> list[str]:
        """Return a command line of Python code under this emulation."""
        return [sys.executable, "-c", f"{self.preamble}\n{code}"]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", **self.variables}


WAYS = {
    "older instructions": Emulation({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}),
    "no oneDNN": Emulation(preamble="import torch; torch.backends.mkldnn.set_flags(False)"),
}


@functools.cache
def is_slow(name: str) -> bool:
    """Return whether a way really makes products in bf16 many times slower than in fp32 on this machine."""
    way = WAYS[name]
    done = subprocess.run(way.python(SPEEDUP), env=way.environment(), capture_output=True, text=True, check=True)
    return float(done.stdout) < 1 / SLOW
