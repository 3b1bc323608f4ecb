"""Locks between real processes."""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from byteloom.core.storage.locks import LockHeldError, LockHolder, holder_of, lock_content, lock_file, lock_folder

HOLD_LOCK = """
import sys, time
from pathlib import Path
from byteloom.core.storage import locks
with getattr(locks, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def lock_in_process(kind: str, path: Path) -> "subprocess.Popen[str]":
    """Start a process that holds a lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, kind, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_lock_file_names_its_holder_until_the_holder_is_killed(tmp_path: Path):
    path = tmp_path / "lock"
    assert holder_of(path) is None
    with lock_in_process("lock_file", path) as process:
        holder = LockHolder(platform.node(), process.pid)
        assert holder_of(path) == holder
        with pytest.raises(LockHeldError, match=f"process {process.pid} on {platform.node()} holds {path}") as caught:
            lock_file(path, seconds=0).__enter__()
        assert caught.value.holder == holder
        assert holder_of(path) == holder  # the failed attempt has not erased the name
        process.kill()
    assert holder_of(path) is None
    with lock_file(path, seconds=0):
        assert holder_of(path) == LockHolder(platform.node(), os.getpid())
    assert holder_of(path) is None


@pytest.mark.slow
def test_waiting_process_gets_the_lock_file_when_the_holder_ends(tmp_path: Path):
    path = tmp_path / "lock"
    with lock_in_process("lock_file", path) as first:
        second = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, "lock_file", str(path)], stdin=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1)
        first.kill()
    assert second.wait(20) == 0


class KillWhenLogged(logging.Handler):
    """Handler that kills a process when something is logged."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        super().__init__()
        self._process = process

    def emit(self, record: logging.LogRecord) -> None:
        self._process.kill()


@pytest.mark.slow
def test_long_wait_for_a_lock_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("byteloom.core.storage.locks.SILENT_WAIT_SECONDS", 0.0)
    caplog.set_level("INFO")
    logger = logging.getLogger("byteloom.core.storage.locks")
    for kind, lock in (("lock_file", lock_file), ("lock_folder", lambda path: lock_folder(path, wait=True))):
        path = tmp_path if kind == "lock_folder" else tmp_path / "lock"
        with lock_in_process(kind, path) as process:
            killer = KillWhenLogged(process)
            logger.addHandler(killer)
            with lock(path):
                pass
            logger.removeHandler(killer)
        holder = f"process {process.pid} on {platform.node()}" if kind == "lock_file" else "another process"
        assert caplog.messages.pop() == f"waiting for {path}, which {holder} holds"


def test_locked_folder_is_refused_and_no_file_is_added(tmp_path: Path):
    with lock_in_process("lock_folder", tmp_path) as process:
        with pytest.raises(LockHeldError), lock_folder(tmp_path):
            pass
        process.kill()
    with lock_folder(tmp_path):
        assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError), lock_folder(tmp_path / "absent"):
        pass


def test_locking_keeps_the_content_of_the_file(tmp_path: Path):
    path = tmp_path / "total"
    path.write_text("12")
    with lock_content(path) as descriptor:
        assert os.pread(descriptor, 8, 0) == b"12"
    assert path.read_text() == "12"
