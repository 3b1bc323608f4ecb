"""`byteloom` commands in new processes, started as the real command or as a fork of a warm process.

A Python that imports torch takes seconds to start. `start` instead forks tests/command_server.py, which has imported
everything and runs the same entry as the real command. `start` runs the real command if the environment differs from
the server's in a variable that imports may read, such as OMP_NUM_THREADS. `warm` starts a server for such commands.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from byteloom.core.errors import CorrectableError
from pretrain.cli.app import app
from tests.command_server import OPTIONAL_MODULES, REQUIRED_MODULES

BYTELOOM = Path(sys.executable).with_name("byteloom")
SERVER = Path(__file__).with_name("command_server.py")
READ_AFTER_IMPORTS = re.compile(
    r"PYTEST_\w+|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|BYTELOOM_(HEARTBEATS|TRACEBACK)"
    r"|AWS_(ENDPOINT_URL|ACCESS_KEY_ID|SECRET_ACCESS_KEY|DEFAULT_REGION)|MLFLOW_HTTP_REQUEST_\w+"
    r"|_BYTELOOM_COMPLETE|COMP_(WORDS|CWORD)|SLURM_CONF"
    r"|MLFLOW_DISABLE_TELEMETRY|_MLFLOW_TELEMETRY_SESSION_ID|_?TORCHINDUCTOR_\w+"
)
"""Environment variables that imports do not read.

MLflow and torch set those of the last line in the process of the tests.
"""


def environment() -> Mapping[str, str]:
    """Return the environment of the commands under test."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(
    arguments: Sequence[object],
    env: Mapping[str, str] | None = None,
    server: "CommandServer | None" = None,
    **options: Any,
) -> subprocess.Popen[Any]:
    """Start a command.

    Args:
        arguments: words after `byteloom`.
        env: by default, `environment()`.
        server: a server of `warm`; by default, the server for `environment()`.
        options: cwd, stdin, stdout, stderr, text and start_new_session of subprocess.Popen.
    """
    env = environment() if env is None else env
    server = server or default_server()
    if server.can_run(env):
        return ForkedCommand(server, [str(BYTELOOM), *map(str, arguments)], env=env, **options)
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


def run_here(*arguments: object) -> tuple[int, str]:
    """Run a command in this process; return its exit code and its output."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        assert isinstance(done.exception, CorrectableError), done.exception
        return 1, f"{done.output}error: {done.exception}"
    return done.exit_code, done.output


class ForkedCommand(subprocess.Popen[Any]):
    """Command forked by the server, with the interface of Popen.

    Popen makes the pipes and calls `_execute_child` to start a program.
    """

    def __init__(self, server: "CommandServer", arguments: Sequence[str], **options: Any) -> None:
        self._server = server
        super().__init__(arguments, **options)

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        """Ask the server to fork, and send it the child's ends of the pipes."""
        *_, new_session, _process_group = more
        pipes = more[3:9]
        child_ends = pipes[0], pipes[3], pipes[5]
        streams = [own if pipe == -1 else pipe for own, pipe in enumerate(child_ends)]
        self._answers, connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with connection:
            request = {
                "arguments": args[1:],
                "folder": os.path.abspath(cwd or "."),  # noqa: PTH100 - any kind of path
                "environment": dict(env),
                "new_session": new_session,
            }
            self._server.send(request, [*streams, connection.fileno()])
        self.pid = self._answer("process")
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _answer(self, kind: str) -> int:
        answer = self._answers.recv(64).decode()
        if not answer:
            raise RuntimeError(f"the command server has ended: {self._server.output()}")
        found, number = answer.split()
        assert found == kind, f"the forked process ended before its command started: {answer}"
        return int(number)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the command ends; return its exit code."""
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


class CommandServer:
    """Warm process of these tests, which ends with them.

    Args:
        env: environment of the commands.
        python: interpreter of the environment in which Byteloom is installed.
        preamble: Python code that runs before the imports.
        modules: modules to import.
    """

    def __init__(
        self,
        env: Mapping[str, str],
        *,
        python: Path | str = sys.executable,
        preamble: str = "",
        modules: Sequence[str] = REQUIRED_MODULES,
    ) -> None:
        self._environment = dict(env)
        self._requests, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with server_end:
            self._process = subprocess.Popen(
                [python, SERVER, Path(python).with_name(BYTELOOM.name), str(server_end.fileno()), preamble, *modules],
                env=self._environment,
                pass_fds=[server_end.fileno()],
                # Children inherit Python's stream objects, so these must be neither terminals nor files.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )

    def can_run(self, env: Mapping[str, str]) -> bool:
        """Return whether an environment equals the server's in every variable that imports may read."""
        changed = {name for name, _ in env.items() ^ self._environment.items()}
        return all(READ_AFTER_IMPORTS.fullmatch(name) for name in changed)

    def send(self, request: Mapping[str, object], descriptors: Sequence[int]) -> None:
        socket.send_fds(self._requests, [json.dumps(request).encode()], descriptors)

    def output(self) -> str:
        """Return the server's standard error after it has ended."""
        _, stderr = self._process.communicate()
        return stderr.decode()

    def end(self) -> None:
        """End the server; commands that run are not affected."""
        self._requests.close()
        self._process.communicate()


@cache
def default_server() -> CommandServer:
    return CommandServer(environment(), modules=REQUIRED_MODULES + OPTIONAL_MODULES)


@contextmanager
def warm(env: Mapping[str, str], **options: Any) -> Iterator[CommandServer]:
    """Yield a server of its own, for commands that start in another environment; with the arguments of the class."""
    server = CommandServer(env, **options)
    try:
        yield server
    finally:
        server.end()
