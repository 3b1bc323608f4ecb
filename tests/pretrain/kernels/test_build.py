"""Build of the AMX kernel: once for all processes, and again after a killed build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until

ROOT = Path(__file__).parents[3]

COMPILER = """#!/bin/sh
echo called >> "$CALLS"
for last; do :; done
echo half > "$last"
while ! test -e "$FINISH"; do sleep 0.02; done
echo whole > "$last"
"""
"""Program with the interface of a compiler, which records each call and waits for a file before it ends."""

SCRIPT = """
import os
from pretrain.kernels.amx_attention import compiled_library
print(compiled_library([os.environ["COMPILER"]]).read_text().strip())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    return os.environ | {
        "CALLS": str(tmp_path / "calls"),
        "COMPILER": str(compiler),
        "FINISH": str(tmp_path / "finish"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }


def start(environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, process_group=0
    )


@pytest.mark.slow
def test_killed_build_does_not_block_the_next_and_processes_started_together_compile_once(
    tmp_path: Path, environment: dict[str, str]
):
    calls = tmp_path / "calls"
    killed = start(environment)
    wait_until(lambda: list((tmp_path / "cache").rglob("*.partial")), "the first build is half done", 120)
    os.killpg(killed.pid, 9)
    killed.communicate()
    together = [start(environment) for _ in range(2)]
    wait_until(lambda: calls.read_text().count("\n") == 2, "one of the two builds", 120)
    (tmp_path / "finish").touch()
    assert [process.communicate()[0] for process in together] == ["whole\n", "whole\n"]
    assert calls.read_text() == "called\ncalled\n"
