"""Real ranks: processes connected by gloo on this machine.

They are forks of one process that has imported the needed modules (warm.py), because the imports take most of the time.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch

import pretrain.conformance.engines  # noqa: F401 - it sets imports of the same process, which CONTEXT replaces
from launchers.processes import free_port
from pretrain.distributed.world import World

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.warm"])


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call an importable function of a world on each rank, and return the results by rank.

    Raises:
        AssertionError: the function raised an exception on a rank; the message has its traceback.
    """
    answers = CONTEXT.Queue()
    port = free_port()
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, size, port, function, arguments, answers), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        values = {}
        for _ in processes:
            rank, fault, value = answers.get(timeout=900)
            assert fault is None, f"rank {rank}:\n{fault}"
            values[rank] = value
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * size
        return [values[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.kill()


def become_rank(rank: int, size: int, port: int) -> None:
    """Make this process a rank by environment variables, as a launcher does."""
    torch.set_num_threads(1)
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"})


def _rank(rank: int, size: int, port: int, function: Callable[..., Any], arguments: Any, answers: Any) -> None:
    become_rank(rank, size, port)
    try:
        world = World.join(torch.device("cpu"))
        value = function(world, *arguments)
        world.leave()
        answers.put((rank, None, value))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
