"""Real ranks: processes that meet over gloo on this machine."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from pretrain.world import World


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function of a world, which can be imported by name, returns on each of so many ranks.

    Raises:
        AssertionError: it raised something on one of them; says what.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, function, arguments, answers), daemon=True)
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


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(rank: int, size: int, port: int, function: Callable[..., Any], arguments: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in (environment | {"MASTER_PORT": port}).items()})
    try:
        world = World.join("cpu")
        value = function(world, *arguments)
        world.leave()
        answers.put((rank, None, value))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
