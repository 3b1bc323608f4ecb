"""The forked commands of tests behave as the real command does."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.commands import ForkedCommand, environment, server, start, start_cold
from tests.distributed.parity import content

STARTS = (start, start_cold)
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.mark.parametrize("arguments", [["config", "show", "debug"], ["no-command"], ["eval", "nowhere"]], ids=" ".join)
def test_output_and_exit_code_are_those_of_the_real_command(tmp_path: Path, arguments: list[str]):
    processes = [begin(arguments, environment(), cwd=tmp_path, **PIPES) for begin in STARTS]
    forked, real = [(*process.communicate(), process.returncode) for process in processes]
    assert isinstance(processes[0], ForkedCommand)
    assert forked == real
    assert b"".join(real[:2])


def test_training_is_bit_for_bit_that_of_the_real_command(recipe: Path, tmp_path: Path):
    short = ("train.steps=4", "validation.every=4")
    checkpoints = []
    for begin in STARTS:
        name = begin.__name__
        with begin(["train", recipe, *short, f"run.name={name}"], environment(), cwd=tmp_path, **PIPES) as process:
            said = process.communicate()
        assert process.returncode == 0, said
        checkpoints.append(content(tmp_path / "runs" / name / "checkpoints/step-00000004"))
    assert checkpoints[0] == checkpoints[1]


def test_a_signal_ends_a_forked_command_that_leads_a_session_of_its_own():
    process = start(["generate", "--prompt-file", "/dev/stdin", "nowhere"], start_new_session=True, **PIPES)
    assert os.getsid(process.pid) == process.pid
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.communicate() == (b"", b"")


@pytest.mark.parametrize(
    ("variables", "can_run"),
    [
        ({"RANK": "1", "MASTER_PORT": "20000"}, True),
        ({"OMP_NUM_THREADS": "2"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        ({"PYTHONPATH": "/somewhere"}, False),
    ],
)
def test_variables_that_imports_read_start_the_real_command(variables: dict[str, str], can_run: bool):
    assert server().can_run({**environment(), **variables}) == can_run


def test_the_real_command_takes_other_variables_than_the_server_has():
    process = start(["--version"], {**environment(), "OMP_NUM_THREADS": "2"}, **PIPES)
    assert not isinstance(process, ForkedCommand)
    assert process.communicate()[0].startswith(b"byteloom")
    assert process.returncode == 0
