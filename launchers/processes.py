"""Ranks as processes of this machine: how they are started, watched and ended.

`byteloom train` in a terminal (local.py) and the supervisor of a run in the background (supervision/machine.py) use it.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

STOPPED = {128 + number: number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)}
"""Exit codes of ranks that stopped on request, and the signal of the request."""
STOP_SECONDS = 5.0
"""Time that the other ranks have to exit once one has stopped on request; they have nothing more to save."""


@dataclass(frozen=True)
class Outcome:
    """End of the ranks of a start, complete or in progress."""

    kind: Literal["finished", "stopped", "failed"]
    rank: int
    """The failed rank with the lowest number; 0 unless one failed."""
    code: int
    """Exit code; negative if a signal killed the rank."""


class RankProcesses:
    """All ranks of one start.

    Args:
        command: command line of every rank.
        count: number of ranks.
        variables: environment variables of every rank, besides those of torchrun.
        own_sessions: start each rank in a session of its own. A terminal's Ctrl-C does not reach it then, and `kill`
            also ends the processes that it started.
    """

    def __init__(
        self, command: Sequence[str], count: int, variables: dict[str, str] | None = None, *, own_sessions: bool = False
    ) -> None:
        self.size = count
        self._command = command
        self._variables = variables or {}
        self._own_sessions = own_sessions
        self._port = free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stop_deadline: float | None = None

    def start_next(
        self, stdin: int, stdout: int | IO[str] | None, stderr: int | IO[str] | None
    ) -> "subprocess.Popen[bytes]":
        """Start the next rank. The streams are arguments of subprocess.Popen."""
        environment = rank_environment(len(self._processes), self.size, self._port) | self._variables
        process = subprocess.Popen(
            self._command,
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=self._own_sessions,
        )
        self._processes.append(process)
        return process

    @property
    def codes(self) -> list[int | None]:
        """Exit code of each rank: negative if a signal killed it, None while it runs."""
        return [process.poll() for process in self._processes]

    def outcome(self) -> Outcome | None:
        """Return how the ranks end; None while they run.

        Before its first step, a rank stops without the others: nothing is lost. They wait for it in a collective, so
        they are asked as well, and have STOP_SECONDS to exit.
        """
        codes = self.codes
        if stopped := [code for code in codes if code in STOPPED]:
            if self._stop_deadline is None:
                self._stop_deadline = time.monotonic() + STOP_SECONDS
                number = STOPPED[stopped[0]]
                # A second SIGINT would kill a rank that is about to exit by itself.
                self.request_stop(signal.SIGTERM if number == signal.SIGINT else number)
            is_over = None not in codes or time.monotonic() > self._stop_deadline
            return Outcome("stopped", 0, max(stopped)) if is_over else None
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                return Outcome("failed", rank, code)
        return None if None in codes else Outcome("finished", 0, 0)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to every rank that runs."""
        for process in self._processes:
            process.send_signal(number)

    def request_stop(self, number: signal.Signals) -> None:
        """Send a signal that asks for a stop to every rank. A rank that was stopped continues, to handle it."""
        self.send(number)
        self.send(signal.SIGCONT)

    def kill(self) -> None:
        """Kill every rank, and wait until it has exited."""
        for process in self._processes:
            if self._own_sessions:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        for process in self._processes:
            process.wait()


def rank_command(module: str, entry: str, recipe: Path | str) -> list[str]:
    """Return the command line of a rank.

    Args:
        module: launchers, or launchers.rank if a supervisor watches the rank.
        entry: "module:function" of the train entry.
        recipe: path of the resolved recipe.
    """
    # -P: do not import from a folder named launchers in the current folder.
    return [sys.executable, "-P", "-m", module, entry, str(recipe)]


def rank_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the environment of a rank, with the variables that torchrun sets.

    All ranks together have as many threads as there are cores that this process may use.
    """
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count))}
    return threads | os.environ | {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    """Return a free port of this machine, a random one so that no rank of an earlier start is met there.

    It is below the ports that Linux assigns to connections.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
        return port


def describe_exit(code: int) -> str:
    """Return how a process ended, as a clause: "was killed by SIGKILL"."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
