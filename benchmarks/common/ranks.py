"""Ranks on this machine: processes of one thread each, connected by gloo."""

import multiprocessing
import queue
import socket
from collections.abc import Callable
from typing import Any

import torch

from pretrain.distributed.world import World


def on_ranks(size: int, function: Callable[..., dict[str, Any]], *arguments: Any) -> list[dict[str, Any]]:
    """Call a function of a benchmark on each rank, and return the results by rank."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = [
        context.Process(target=_on_rank, args=(rank, size, port, function, arguments, answers), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results: dict[int, dict[str, Any]] = {}
    while len(results) < size:
        try:
            rank, answer = answers.get(timeout=1)
            results[rank] = answer
        except queue.Empty:
            if any(process.exitcode for process in processes):
                raise SystemExit("a rank failed; its output is above") from None
    for process in processes:
        process.join()
    return [results[rank] for rank in range(size)]


def _on_rank(rank: int, size: int, port: int, function: Callable[..., Any], arguments: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    variables = {name: str(value) for name, value in environment.items()} | {"MASTER_ADDR": "127.0.0.1"}
    world = World.join(torch.device("cpu"), variables)
    answers.put((rank, function(world, *arguments)))
    world.leave()
