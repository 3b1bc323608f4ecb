"""Laws of a training step on CUDA, on a device that computes no values; see fake_cuda/device.py.

Left out: DDP over ranks, whose C++ code reads values; DeepSpeed and offload, which decide about updates on the host;
float8, which needs torchao; compiled blocks, and the kernel of FlexAttention.
"""

import json
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import waits
from tests.pretrain.engines.fake_cuda.steps import CASES, MICRO_BATCHES, STEPS

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FOLDER = Path(__file__).parent / "fake_cuda"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="the fake CUDA device needs a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA has its own device; see tests/gpu"),
]

NUMBERS = f"Event.synchronize in {waits.NUMBERS}"
WAITS_BEFORE_UPDATE = {name: f"read of a value in {place}" for name, place in waits.WAITS_BEFORE_UPDATE.items()}
ON_THE_HOST = {
    "base:_scored_targets": "the targets that a model draws are counted before the passes",
    "draws": "a model draws crops and inputs, whose number the host must know",
    "perceiver_ar:part": "takes this rank's part of the drawn inputs",
    "transfers:send": "moves arrays to pinned memory",
    "base:_exchanged": "reads the numbers that have arrived",
}
"""Functions that may use tensors of the host, and why."""


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what `fake_cuda.steps.findings` returns by case, in a process whose torch has the fake device."""
    shim, library = tmp_path_factory.mktemp("fake_cuda") / "shim.so", Path(torch.__file__).parent
    includes = [f"-I{library / 'include'}", f"-I{library / 'include/torch/csrc/api/include'}"]
    flags = ["-O0", "-shared", "-fPIC", "-std=c++20", *includes, f"-L{library / 'lib'}", "-lc10", "-ltorch_cpu"]
    assert COMPILER is not None
    subprocess.run([COMPILER, str(FOLDER / "shim.cpp"), "-o", str(shim), *flags], check=True)
    command = [sys.executable, "-m", "tests.pretrain.engines.fake_cuda.steps", str(shim)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.parametrize("case", CASES)
def test_host_waits_once_a_step_after_it_has_queued_the_update(findings: dict[str, dict[str, Any]], case: str):
    """The votes and the target bytes of the next step come with the numbers of this one.

    Device mismatches raise, so a step that ends has none.
    """
    course = [what for what, _ in groupby(findings[case]["course"])]  # an update is one operation a group of parameters
    assert course == [*filter(None, [WAITS_BEFORE_UPDATE.get(case)]), "update", NUMBERS] * STEPS


def test_latents_see_all_inputs_through_a_block_mask_and_not_a_dense_one(findings: dict[str, dict[str, Any]]):
    """The cross-attend of each micro-batch."""
    assert findings["all inputs in blocks"]["attentions in blocks"] == STEPS * MICRO_BATCHES
    assert findings["perceiver_ar, bf16"]["attentions in blocks"] == 0  # inputs are dropped


def test_ranks_exchange_other_numbers_through_the_device(findings: dict[str, Any]):
    assert findings["vote"] == [NUMBERS]


@pytest.mark.parametrize("case", CASES)
def test_host_computes_nothing_of_a_step(findings: dict[str, dict[str, Any]], case: str):
    assert set(findings[case]["host"]) <= ON_THE_HOST.keys()
    assert findings[case]["device operations"] > 1000
