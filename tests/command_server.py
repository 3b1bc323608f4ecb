"""A process that forks a child for each `byteloom` command, with the imports of all commands done once.

    test ── arguments, folder, environment, standard streams ──▶ server ── fork ──▶ child: pretrain.cli.entry.main
         ◀── process id, then exit code, on a connection of its own ──

The child returns from `serve` to the end of this file, runs the entry of the console script there, and ends. The server
computes nothing and has one thread, because a process with threads cannot be forked safely. tests/commands.py starts it
and sends requests.
"""

import atexit
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

MODULES = (
    "pretrain.cli.entry",
    "pretrain.cli.app",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "mlflow",
    "s3fs",
)
"""Modules that commands import, at their start or later."""
JEMALLOC = "jemalloc_bg_thd"
"""Thread of the allocator of pyarrow, which stops and starts it around a fork."""
LONGEST_REQUEST = 1 << 20


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
                for inherited in (requests, *(other for _, other in children.values())):
                    inherited.close()
                for pidfd in children:
                    os.close(pidfd)
                with connection:
                    arguments = _become(json.loads(content), streams)
                    _send(connection, "process", os.getpid())  # a signal finds it ready from now on
                return arguments
            for stream in streams:
                os.close(stream)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (pid, connection)
            poll.register(pidfd, select.POLLIN)


def _send(connection: socket.socket, kind: str, number: int) -> None:
    with suppress(BrokenPipeError):  # the test has dropped the command
        connection.send(f"{kind} {number}".encode())


def _become(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Make this child the process that a request asks for; return the arguments of its command."""
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


class Ending:
    """The end of a command: that of Python, but for the teardown of thousands of modules, which takes half a second.

    Exit functions are called in reverse order, so the one that is registered before the imports is called last.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        """Exit code; None leaves all of the end to Python."""
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


if __name__ == "__main__":
    ending = Ending()
    script, descriptor = sys.argv[1:]
    sys.path[0] = str(Path(script).parent)  # as for the console script
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which close the connection
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # as pretrain.tracking sets it before it imports MLflow

    from byteloom.core.packages import long_lived_imports

    with long_lived_imports():
        for module in MODULES:
            importlib.import_module(module)
    sys.argv = [script, *serve(socket.socket(fileno=int(descriptor)))]
    ending.run(sys.modules["pretrain.cli.entry"].main)
