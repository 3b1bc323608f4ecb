"""Live view in a real pseudo-terminal: keys, signals, and the state in which it leaves the terminal."""

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

SCRIPT = """
import itertools, os, time
os.login_tty(int(os.environ["TERMINAL"]))
from rich.text import Text
from pretrain.terminal.screen import watch
count = itertools.count()
def read():
    number = next(count)
    if number == int(os.environ["FAILS_AT"]):
        raise ValueError("cannot read")
    return number
watch(read, lambda number, console: Text(f"frame {number} of {console.size.width} columns"), 1000)
"""
PATIENCE = 60
ROOT = Path(__file__).parents[3]


class Terminal:
    """A process in a pseudo-terminal of its own."""

    def __init__(self, fails_at: int = -1) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (20, 60))
        self.settings = termios.tcgetattr(self.slave)
        self.shown = b""
        environment = {**os.environ, "TERMINAL": str(self.slave), "FAILS_AT": str(fails_at), "TERM": "xterm"}
        environment.pop("COLUMNS", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT], pass_fds=[self.slave], env=environment, cwd=ROOT, start_new_session=True
        )

    def wait_for(self, text: bytes) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.master], [], [], 1)[0]:
                self.shown += os.read(self.master, 4096)

    def end(self) -> int:
        """Wait for the end of the process; check that the terminal is as it was."""
        code = self.process.wait(PATIENCE)
        while select.select([self.master], [], [], 0)[0]:
            self.shown += os.read(self.master, 4096)
        assert termios.tcgetattr(self.slave) == self.settings
        assert self.shown.rindex(b"\x1b[?1049l") > self.shown.rindex(b"\x1b[?1049h")  # the alternate screen was left
        assert self.shown.rindex(b"\x1b[?25h") > self.shown.rindex(b"\x1b[?25l")  # the cursor is shown
        os.close(self.master)
        os.close(self.slave)
        return code


def test_key_refreshes_a_new_size_redraws_and_q_restores_the_terminal():
    terminal = Terminal()
    terminal.wait_for(b"frame 0 of 60 columns")
    os.write(terminal.master, b" ")
    terminal.wait_for(b"frame 1 of 60 columns")
    termios.tcsetwinsize(terminal.master, (20, 100))
    terminal.wait_for(b"frame 1 of 100 columns")
    os.write(terminal.master, b"q")
    assert terminal.end() == 0


@pytest.mark.parametrize(("how", "code"), [("Ctrl-C", 0), ("SIGTERM", 128 + signal.SIGTERM), ("error", 1)])
def test_terminal_is_restored_however_the_view_ends(how: str, code: int):
    terminal = Terminal(fails_at=1 if how == "error" else -1)
    terminal.wait_for(b"frame 0")
    if how == "SIGTERM":
        terminal.process.terminate()
    else:
        os.write(terminal.master, b"\x03" if how == "Ctrl-C" else b" ")
    assert terminal.end() == code
