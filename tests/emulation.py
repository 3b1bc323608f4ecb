"""Emulation of bf16 on any CPU, by settings that keep libraries from its bf16 instructions."""

import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

SLOW = 5
"""Minimum slowdown of an emulated product in bf16 relative to fp32."""
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
    """Settings that keep torch from the CPU's bf16 instructions."""

    variables: Mapping[str, str] = field(default_factory=dict)
    preamble: str = ""
    """Python code that runs first."""

    def python(self, code: str) -> list[str]:
        """Return a command line of Python code under this emulation."""
        return [sys.executable, "-c", f"{self.preamble}\n{code}"]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", **self.variables}


OLDER, NO_ONEDNN = "older instructions", "no oneDNN"
EMULATIONS = {
    OLDER: Emulation({"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}),
    NO_ONEDNN: Emulation(preamble="import torch; torch.backends.mkldnn.set_flags(False)"),
}


@functools.cache
def is_slow(name: str) -> bool:
    """Return whether an emulation really makes products in bf16 many times slower than in fp32 on this machine."""
    emulation = EMULATIONS[name]
    command = emulation.python(SPEEDUP)
    done = subprocess.run(command, env=emulation.environment(), capture_output=True, text=True, check=True)
    return float(done.stdout) < 1 / SLOW
