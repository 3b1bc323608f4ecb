"""Real ranks: processes that meet over gloo on this machine.

They are forks of one process that has imported what they need (warm.py), which takes as long as all else together.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch

from launchers.processes import free_port
from pretrain.distributed.world import World

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.warm"])


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of a world, which can be imported by name, returns on each of so many ranks.

    Raises:
        AssertionError: it raised something on one of them; says what.
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
        told = {}
        for _ in processes:
            rank, fault, value = answers.get(timeout=900)
            assert fault is None, f"rank {rank}:\n{fault}"
            told[rank] = value
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * size
        return [told[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.kill()


def take_place(rank: int, size: int, port: int) -> None:
    """Makes this process a rank, as a launcher does by the environment."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})


def _rank(rank: int, size: int, port: int, function: Callable[..., Any], arguments: Any, answers: Any) -> None:
    take_place(rank, size, port)
    try:
        world = World.join("cpu")
        value = function(world, *arguments)
        world.leave()
        answers.put((rank, None, value))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
