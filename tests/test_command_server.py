"""Forked commands behave like the real command."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.commands import ForkedCommand, default_server, environment, start, start_cold
from tests.distributed.parity import content

START_FUNCTIONS = (start, start_cold)
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["config", "show", "debug"], ["eval", "nowhere"]], ids=" ".join)
def test_forked_command_has_the_output_and_exit_code_of_the_real_command(tmp_path: Path, arguments: list[str]):
    processes = [start_function(arguments, environment(), cwd=tmp_path, **PIPES) for start_function in START_FUNCTIONS]
    forked, real = [(*process.communicate(), process.returncode) for process in processes]
    assert isinstance(processes[0], ForkedCommand)
    assert forked == real
    assert b"".join(real[:2])


@pytest.mark.slow
def test_forked_training_equals_the_real_command_bit_for_bit(recipe: Path, tmp_path: Path):
    short = ("train.steps=4", "validation.every=4")
    checkpoints = []
    for start_function in START_FUNCTIONS:
        name = start_function.__name__
        with start_function(
            ["train", recipe, *short, f"run.name={name}"], environment(), cwd=tmp_path, **PIPES
        ) as process:
            output = process.communicate()
        assert process.returncode == 0, output
        checkpoints.append(content(tmp_path / "runs" / name / "checkpoints/step-00000004"))
    assert checkpoints[0] == checkpoints[1]


def test_signal_ends_a_forked_command_in_a_new_session(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)  # the command waits for a writer, so it does not end by itself
    process = start(["config", "show", recipe], start_new_session=True, **PIPES)
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
def test_changed_variables_that_imports_read_need_the_real_command(variables: dict[str, str], can_run: bool):
    assert default_server().can_run({**environment(), **variables}) == can_run


@pytest.mark.slow
def test_command_with_changed_thread_count_is_not_forked():
    process = start(["--version"], {**environment(), "OMP_NUM_THREADS": "2"}, **PIPES)
    assert not isinstance(process, ForkedCommand)
    assert process.communicate()[0].startswith(b"byteloom")
    assert process.returncode == 0
