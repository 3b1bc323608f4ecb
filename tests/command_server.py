"""Process that forks a child for each `byteloom` command, after it has imported the modules of all commands once.

    test ── arguments, folder, environment, standard streams ──▶ server ── fork ──▶ child: pretrain.cli.entry.main
         ◀── process id, then exit code, on one connection per command ──

The child returns from `serve` to the end of this file, runs the entry of the console script, and exits. The server
computes nothing and has one thread, because a process with threads cannot be forked safely. tests/commands.py starts
the server and sends requests.

A command starts ranks as `python -P -m launchers`. In a child of the server, a rank is a fork of the command, because
the imports take seconds. It is a child process with its own streams, session and signals, like the real one.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

REQUIRED_MODULES = (
    "pretrain.cli.entry",
    "pretrain.cli.app",
    "pretrain.cli.train",
    "pretrain.cli.config",
    "pretrain.cli.corpora.inspect",
    "pretrain.cli.corpora.maintain",
    "pretrain.cli.corpora.prepare",
    "pretrain.cli.models.conformance",
    "pretrain.cli.models.estimate",
    "pretrain.cli.models.evaluate",
    "pretrain.cli.models.generate",
    "pretrain.cli.runs.branch",
    "pretrain.cli.runs.compare",
    "pretrain.cli.runs.checkpoints",
    "pretrain.cli.runs.health",
    "pretrain.cli.runs.status",
    "pretrain.cli.runs.submit",
    "pretrain.cli.runs.sweep",
    "pretrain.cli.runs.top",
    "pretrain.cli.runs.tracking",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
)
"""Modules that commands import, at startup or later."""
OPTIONAL_MODULES = ("mlflow", "s3fs")
"""Modules that some commands import."""
JEMALLOC = "jemalloc_bg_thd"
"""Thread of pyarrow's allocator, which stops and restarts it around a fork."""
LONGEST_REQUEST = 1 << 20
RANK = [sys.executable, "-P", "-m", "launchers"]
"""First words of the command line of a rank."""
TRAIN = [sys.executable, "-P", "-m", "pretrain.cli.entry", "train"]
"""First words of the command line of a run of `sweep` or `compare`."""


def serve(requests: socket.socket) -> list[str]:
    """Fork a child for each request until the connection closes.

    Returns:
        In a child only: the arguments of its command.
    """
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len(threads) == 1 + threads.count(JEMALLOC), f"a process with these threads cannot be forked: {threads}"
    children: dict[int, tuple[int, socket.socket]] = {}  # by pidfd: process id and connection
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor in children:
                poll.unregister(descriptor)
                os.close(descriptor)
                pid, connection = children.pop(descriptor)
                _send(connection, "exit", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                connection.close()
                continue
            content, descriptors, _, _ = socket.recv_fds(requests, LONGEST_REQUEST, 4)
            if not content:
                sys.exit()  # the tests have ended
            *streams, answers = descriptors
            connection = socket.socket(fileno=answers)
            if (pid := os.fork()) == 0:
                for inherited in (requests, *(connection for _, connection in children.values())):
                    inherited.close()
                for pidfd in children:
                    os.close(pidfd)
                with connection:
                    arguments = _apply_request(json.loads(content), streams)
                    _send(connection, "process", os.getpid())  # from now on the child handles signals
                return arguments
            for stream in streams:
                os.close(stream)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (pid, connection)
            poll.register(pidfd, select.POLLIN)


def _send(connection: socket.socket, kind: str, number: int) -> None:
    with suppress(BrokenPipeError):  # the test has dropped the command
        connection.send(f"{kind} {number}".encode())


def _apply_request(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Set up this child as a request asks; return the arguments of its command."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    if request["new_session"]:
        os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return request["arguments"]


class CommandExit:
    """Exit of a command without the teardown of thousands of modules, which takes half a second.

    Exit functions are called in reverse order. The one registered before the imports is called last.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        """Exit code; None leaves the whole exit to Python."""
        atexit.register(self._exit)

    def run(self, main: Callable[[], object]) -> None:
        """Run the entry of a command."""
        try:
            main()
            self.code = 0
        except SystemExit as end:
            self.code = end.code if isinstance(end.code, int) else int(end.code is not None)
            raise

    def _exit(self) -> None:
        if self.code is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)


class ForkingPopen(subprocess.Popen[Any]):
    """Process that a command starts. A rank or a run is a fork of the command; others start as usual."""

    command_exit: ClassVar[CommandExit]

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        if not any(list(args[: len(words)]) == words for words in (RANK, TRAIN)):
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more)
            return
        *_, new_session, _process_group = more
        pipes = more[3:9]
        child_ends = pipes[0], pipes[3], pipes[5]
        streams = [own if pipe == -1 else pipe for own, pipe in enumerate(child_ends)]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run_rank(args[len(RANK) - 1 :], env, streams, new_session)
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _run_rank(
        self, words: list[str], env: Mapping[str, str] | None, streams: list[int], new_session: bool
    ) -> NoReturn:
        """Run a rank in this fork and exit. No frame of the command that was forked may run again."""
        try:
            for number, stream in enumerate([os.dup(stream) for stream in streams]):
                os.dup2(stream, number)
            os.closerange(3, max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1)
            if new_session:
                os.setsid()
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            for number in signal.valid_signals():
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            weakref.finalize._registry.clear()  # the command deletes its temporary folders itself
            sys.argv = words
            self.command_exit.run(partial(runpy.run_module, words[0], run_name="__main__", alter_sys=True))
        except SystemExit:
            pass
        except BaseException:
            self.command_exit.code = 1
            sys.excepthook(*sys.exc_info())
        finally:
            threading._shutdown()
            atexit._run_exitfuncs()  # ends in CommandExit
            os._exit(1)


if __name__ == "__main__":
    command_exit = CommandExit()
    script, descriptor, preamble, *modules = sys.argv[1:]
    sys.path[0] = str(Path(script).parent)  # as for the console script
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests handle Ctrl-C and close the connection
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # as pretrain.tracking sets it before it imports MLflow

    from byteloom.core.packages import long_lived_imports

    with long_lived_imports():
        exec(preamble)
        for module in modules:
            importlib.import_module(module)
    sys.argv = [script, *serve(socket.socket(fileno=int(descriptor)))]
    ForkingPopen.command_exit = command_exit
    subprocess.Popen = ForkingPopen
    command_exit.run(sys.modules["pretrain.cli.entry"].main)
