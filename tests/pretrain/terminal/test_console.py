"""Errors of commands: one line that a user can act on, or one line, a crash file and exit code 70."""

import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from byteloom.core.storage.state_files import StateFileError
from launchers.local import run_processes
from launchers.supervision.plan import SuperviseConfig
from pretrain.terminal import crash
from pretrain.terminal.console import run
from tests.commands import BYTELOOM

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _run_in_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(crash.SHOW, raising=False)
    monkeypatch.setattr(crash, "_preferred", [])  # another test may have trained a run in this process


def run_to_exit(command: Callable[[], object], capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as caught:
        run(command)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capfd.readouterr().err.splitlines()


def fail() -> None:
    raise KeyError("patch_size\nand more")


def crash_file(folder: Path) -> Path:
    [path] = folder.glob("byteloom-crash-*.txt")
    return path


def test_unexpected_error_gives_one_line_a_crash_file_and_exit_code_70(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    code, lines = run_to_exit(fail, capfd)
    path = crash_file(tmp_path)
    assert (code, lines) == (
        70,
        [
            r"error: unexpected KeyError: 'patch_size\nand more'; "
            f"{path.name} has the traceback, please report it with that file"
        ],
    )
    text = path.read_text()
    for fact in ("command: ", "python: 3.", "torch: 2.", "byteloom: ", "in fail\n", "KeyError: "):
        assert fact in text


def test_environment_variable_also_shows_the_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(crash.SHOW, "1")
    _, lines = run_to_exit(fail, capfd)
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith("error: unexpected KeyError: ")
    assert crash_file(tmp_path)


@contextmanager
def in_deleted_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    try:
        yield
    finally:
        os.chdir(before)


def test_crash_file_is_in_the_run_folder_the_working_folder_or_the_temporary_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    monkeypatch.setattr(crash, "_preferred", [folder])
    run_to_exit(fail, capfd)
    crash_file(tmp_path).unlink()  # the run folder does not exist yet
    folder.mkdir()
    run_to_exit(fail, capfd)
    crash_file(folder)
    folder.rename(tmp_path / "gone")
    (tmp_path / "tmp").mkdir()
    with in_deleted_folder(tmp_path / "here"), monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        run_to_exit(fail, capfd)
        crash_file(tmp_path / "tmp")
        patch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        _, lines = run_to_exit(fail, capfd)
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].endswith(", whose traceback is above")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "out/x"), "error: out/x: No space left on device"),
        (OSError("out cannot be written"), "error: out cannot be written"),
        (OSError(), "error: OSError"),
        (StateFileError("a is damaged: it is empty; remove it"), "error: a is damaged: it is empty; remove it"),
        (StateFileError("\x1b[31ma\x08 is damaged"), r"error: \x1b[31ma\x08 is damaged"),
    ],
)
def test_error_that_a_user_can_correct_gives_one_line_and_exit_code_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], error: Exception, line: str
):
    def command() -> None:
        raise error

    assert run_to_exit(command, capfd) == (1, [line])
    assert not list(tmp_path.iterdir())


def test_error_of_a_thread_gives_a_line_and_a_crash_file_and_the_command_continues(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    def command() -> str:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return "done"

    assert run(command) == "done"
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: unexpected KeyError: ") and crash_file(tmp_path).name in line


def start(recipe: Path) -> int:
    """Run a train entry whose second rank raises an unexpected error while the others wait."""
    return run(lambda: fail_as_rank_1(recipe))


def fail_as_rank_1(recipe: Path) -> int:
    from pretrain.terminal.console import set_rank  # noqa: PLC0415

    crash.keep_in(recipe.parent)
    rank = int(os.environ["RANK"])
    set_rank(rank)
    if rank == 1:
        raise ZeroDivisionError("of a rank")
    threading.Event().wait()
    return 0


@pytest.mark.slow
def test_launcher_shows_an_unexpected_error_of_a_rank_and_exits_with_its_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    entry, logs = "tests.pretrain.terminal.test_console:start", lambda rank: Path(f"{rank}.log")
    code = run_processes(entry, tmp_path / "recipe", 2, logs, SuperviseConfig())
    assert code == crash.EXIT_CODE
    stderr = capfd.readouterr().err
    path = crash_file(tmp_path)
    assert f"rank 1: error: unexpected ZeroDivisionError: of a rank; {path} has the traceback" in stderr
    assert "Traceback" not in stderr
    assert "rank: 1\n" in path.read_text()


@pytest.mark.slow
def test_import_error_of_a_library_is_reported_by_the_command(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
    done = subprocess.run(
        [BYTELOOM, "train", "recipe.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == crash.EXIT_CODE
    [line] = done.stderr.splitlines()
    assert re.match(r"error: unexpected ImportError: libtorch.so: .*; byteloom-crash-.*txt has the traceback", line)
    assert done.stdout == ""
