"""Ends of commands: one line that a user can act on, or one line, a crash file and exit code 70."""

import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from byteloom.core.state_files import StateFileError
from launchers.local import run_processes
from pretrain.terminal import crash
from pretrain.terminal.console import run
from tests.commands import BYTELOOM

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(crash.SHOW, raising=False)
    monkeypatch.setattr(crash, "_preferred", [])  # another test may have trained a run in this process


def ended(command: Callable[[], object], capfd: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as caught:
        run(command, ())
    assert isinstance(caught.value.code, int)
    return caught.value.code, capfd.readouterr().err.splitlines()


def fail() -> None:
    raise KeyError("patch_size\nand more")


def crash_file(folder: Path) -> Path:
    [path] = folder.glob("byteloom-crash-*.txt")
    return path


def test_an_unexpected_error_is_one_line_a_file_with_the_traceback_and_exit_code_70(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    code, lines = ended(fail, capfd)
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


def test_an_environment_variable_also_shows_the_traceback(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(crash.SHOW, "1")
    _, lines = ended(fail, capfd)
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith("error: unexpected KeyError: ")
    assert crash_file(tmp_path)


@contextmanager
def in_a_folder_that_is_gone(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    try:
        yield
    finally:
        os.chdir(before)


def test_the_crash_file_is_in_the_run_folder_or_here_or_in_the_temporary_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    monkeypatch.setattr(crash, "_preferred", [folder])
    ended(fail, capfd)
    crash_file(tmp_path).unlink()  # there is no run folder yet
    folder.mkdir()
    ended(fail, capfd)
    crash_file(folder)
    folder.rename(tmp_path / "gone")
    (tmp_path / "tmp").mkdir()
    with in_a_folder_that_is_gone(tmp_path / "here"), monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
        ended(fail, capfd)
        crash_file(tmp_path / "tmp")
        patch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        _, lines = ended(fail, capfd)
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].endswith(", whose traceback is above")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "out/x"), "error: out/x: No space left on device"),
        (OSError("out cannot be written"), "error: out cannot be written"),
        (OSError(), "error: OSError"),
        (StateFileError("a is damaged: it is empty; remove it"), "error: a is damaged: it is empty; remove it"),
    ],
)
def test_an_error_that_a_user_can_correct_is_a_line_and_exit_code_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], error: Exception, line: str
):
    def command() -> None:
        raise error

    assert ended(command, capfd) == (1, [line])
    assert not list(tmp_path.iterdir())


def test_an_error_that_ends_a_thread_is_a_line_and_a_file_and_does_not_end_the_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    def command() -> str:
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        return "done"

    assert run(command, ()) == "done"
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error: unexpected KeyError: ") and crash_file(tmp_path).name in line


def start(recipe: Path) -> int:
    """Run a train entry whose second rank raises an unexpected error while the others wait."""
    return run(lambda: fail_as_rank_1(recipe), ())


def fail_as_rank_1(recipe: Path) -> int:
    from pretrain.terminal.console import set_rank  # noqa: PLC0415

    crash.keep_in(recipe.parent)
    rank = int(os.environ["RANK"])
    set_rank(rank)
    if rank == 1:
        raise ZeroDivisionError("of a rank")
    threading.Event().wait()
    return 0


def test_the_launcher_shows_an_unexpected_error_of_a_rank_and_exits_with_its_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = run_processes(
        "tests.pretrain.terminal.test_console:start", tmp_path / "recipe", 2, lambda rank: Path(f"{rank}.log")
    )
    assert code == crash.EXIT_CODE
    said = capfd.readouterr().err
    path = crash_file(tmp_path)
    assert f"rank 1: error: unexpected ZeroDivisionError: of a rank; {path} has the traceback" in said
    assert "Traceback" not in said
    assert "rank: 1\n" in path.read_text()


def test_a_library_that_cannot_be_imported_is_reported_by_the_command(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')")
    done = subprocess.run(
        [BYTELOOM, "train", "recipe.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == crash.EXIT_CODE
    [line] = done.stderr.splitlines()
    assert re.match(r"error: unexpected ImportError: libtorch.so: .*; byteloom-crash-.*txt has the traceback", line)
    assert done.stdout == ""
