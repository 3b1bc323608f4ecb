"""The benchmark of everything that needs a GPU: alive on a CPU with few packages, and right on a GPU."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_project import ROOT

BENCHMARK = ROOT / "benchmarks/gpu.py"
FEW_PACKAGES = (
    *("torch", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec"),
    *("numpy", "numpy.libs", "yaml", "nvidia", "triton", "setuptools"),
    *("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "typing_extensions.py"),
)
"""torch, numpy, pyyaml and pydantic, and what they need."""


def python_with_few_packages(folder: Path) -> str:
    """Make a virtual environment of few packages, without Byteloom, and return its Python."""
    venv.create(folder, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    installed = Path(torch.__file__).parents[1]
    for name in FEW_PACKAGES:
        if (installed / name).exists():
            (own / name).symlink_to(installed / name)
    return str(folder / "bin/python")


def results_of(folder: Path, *options: str, python: str = sys.executable) -> dict[str, Any]:
    """Run the benchmark, and return the results by part."""
    command = [python, str(BENCHMARK), "--out", str(folder), *options]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["parts"]
    wrong = {name: result["reason"] for name, result in results.items() if result["status"] in ("failed", "crashed")}
    assert not wrong, f"{wrong}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, done.stderr
    return results


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_from_the_source_tree_with_torch_numpy_pydantic_and_yaml(tmp_path: Path):
    python = python_with_few_packages(tmp_path / "venv")
    results = results_of(tmp_path, "--device", "cpu", python=python)
    left_out = {name: result["reason"] for name, result in results.items() if result["status"] == "left out"}
    assert set(left_out) == {"limits", "command", "mamba"}
    assert left_out["command"].startswith("missing: zstandard")
    assert all(result["rows"] for name, result in results.items() if name not in left_out)
    written = tmp_path / "results.json"
    before = written.read_text()
    results_of(tmp_path, "--device", "cpu", python=python)  # every part is done
    assert written.read_text() == before


@pytest.mark.long
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_every_part_is_right_on_a_gpu(tmp_path: Path):
    results_of(tmp_path, "--toy")
