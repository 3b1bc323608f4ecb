"""`byteloom` commands in processes of their own, started by the real command or by a fork of a warm process.

A Python that imports torch takes seconds to start. `start` forks tests/command_server.py instead, which has imported
everything and runs the same entry as the real command. It starts the real command where the environment differs from
the server's in a variable that may be read during imports, such as OMP_NUM_THREADS.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

BYTELOOM = Path(sys.executable).with_name("byteloom")
SERVER = Path(__file__).with_name("command_server.py")
READ_LATE = re.compile(
    r"PYTEST_\w+|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|BYTELOOM_(HEARTBEATS|TRACEBACK)"
    r"|AWS_(ENDPOINT_URL|ACCESS_KEY_ID|SECRET_ACCESS_KEY|DEFAULT_REGION)|MLFLOW_HTTP_REQUEST_\w+"
    r"|MLFLOW_DISABLE_TELEMETRY|_MLFLOW_TELEMETRY_SESSION_ID|TORCHINDUCTOR_CACHE_DIR"
)
"""Environment variables that are read after the imports only, if at all.

The last three are set by MLflow and torch in the process of the tests.
"""


def environment() -> Mapping[str, str]:
    """Return the environment of the commands under test."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(arguments: Sequence[object], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
    """Start a command.

    Args:
        arguments: those after `byteloom`.
        env: by default, `environment()`.
        options: cwd, stdin, stdout, stderr, text and start_new_session of subprocess.Popen.
    """
    env = environment() if env is None else env
    if server().can_run(env):
        return ForkedCommand([str(BYTELOOM), *map(str, arguments)], env=env, **options)
    return start_cold(arguments, env, **options)


def start_cold(arguments: Sequence[object], env: Mapping[str, str], **options: Any) -> subprocess.Popen[Any]:
    """Start the real command, with the arguments of `start`."""
    return subprocess.Popen([str(BYTELOOM), *map(str, arguments)], env=env, **options)


def run(
    arguments: Sequence[object], check: bool = False, capture_output: bool = False, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end, with the arguments of `start` and the result of subprocess.run."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(arguments, **options) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.kill()
            raise
        done = subprocess.CompletedProcess(process.args, process.wait(), out, err)
    if check:
        done.check_returncode()
    return done


class ForkedCommand(subprocess.Popen[Any]):
    """A command that the server has forked, with the interface of Popen.

    Popen makes the pipes; `_execute_child` is where it would start a program.
    """

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        """Have the server fork, with the ends of the pipes that are the child's."""
        *_, new_session, _process_group = others
        pipes = others[3:9]
        theirs = pipes[0], pipes[3], pipes[5]
        streams = [own if pipe == -1 else pipe for own, pipe in enumerate(theirs)]
        self._answers, connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with connection:
            request = {
                "arguments": args[1:],
                "folder": os.path.abspath(cwd or "."),  # noqa: PTH100 - any kind of path
                "environment": dict(env),
                "new_session": new_session,
            }
            server().send(request, [*streams, connection.fileno()])
        self.pid = self._answer("process")
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _answer(self, kind: str) -> int:
        answer = self._answers.recv(64).decode()
        if not answer:
            raise RuntimeError(f"the server of commands has ended: {server().said()}")
        found, number = answer.split()
        assert found == kind, f"the forked process has ended before its command began: {answer}"
        return int(number)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit code."""
        if self.returncode is None:
            if not wait([self._answers], timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = self._answer("exit")
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs."""
        if self.returncode is None and wait([self._answers], 0):
            self.wait()
        return self.returncode


class _Server:
    """The warm process of these tests; it ends when they do."""

    def __init__(self) -> None:
        self._environment = dict(environment())
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, SERVER, BYTELOOM, str(theirs.fileno())],
                env=self._environment,
                pass_fds=[theirs.fileno()],
                # Its children inherit Python's stream objects, so these are no terminals and no files.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )

    def can_run(self, env: Mapping[str, str]) -> bool:
        """Return whether all that imports may read of an environment is as it was for the server."""
        changed = {name for name, _ in env.items() ^ self._environment.items()}
        return all(READ_LATE.fullmatch(name) for name in changed)

    def send(self, request: Mapping[str, object], descriptors: Sequence[int]) -> None:
        socket.send_fds(self._requests, [json.dumps(request).encode()], descriptors)

    def said(self) -> str:
        """Return what the server has said, once it has ended."""
        _, said = self._process.communicate()
        return said.decode()


@cache
def server() -> _Server:
    return _Server()
