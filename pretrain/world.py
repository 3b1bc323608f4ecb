"""The processes of one training run, and the little that they tell each other beside gradients.

A launcher starts the train entry once a rank and says which rank it is, in the environment variables of torchrun
(RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Under a bare `srun` they follow from Slurm's own. One process
without any of them is a world of its own, and needs no process group.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others before it gives up. A launcher ends them all much sooner when one has died."""


class WorldError(Exception):
    """The processes of a run do not come together."""


class World:
    """This process among those of a run.

    Everything here goes by way of the hosts (gloo), whatever device the run computes on.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @classmethod
    def join(cls, device_type: str, environment: Mapping[str, str] = os.environ) -> Self:
        """Comes together with the other processes of the run that the environment speaks of.

        Args:
            device_type: cpu or cuda: what tensors of collectives will lie on, beside the hosts' memory.
        Raises:
            WorldError: the environment is incomplete, or the others do not come.
        """
        place = _place(environment)
        if place is None:
            return cls()
        rank, size, local_rank, address, port = place
        if size == 1:
            return cls()
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend, init_method=f"tcp://{address}:{port}", rank=rank, world_size=size, timeout=PATIENCE
            )
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            raise WorldError(f"rank {rank} of {size} cannot meet the others at {address}:{port}: {error}") from error
        return cls(rank, size, local_rank)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """The sums over all ranks, in double precision: whole numbers up to 2^53 exactly."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather_numbers(self, *numbers: float) -> list[list[float]]:
        """What each rank says, by rank, on all of them: as many numbers from each, in double precision."""
        own = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return [own.tolist()]
        told = torch.empty(self.size * len(numbers), dtype=torch.float64)
        dist.all_gather_single(told, own)
        return told.view(self.size, -1).tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, by rank, on all of them. A value is JSON."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        all_padded = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(all_padded, padded)
        return [
            json.loads(data[: int(length)].numpy().tobytes()) for data, length in zip(all_padded, lengths, strict=True)
        ]

    def on_first(self, function: Callable[[], Any], faults: Sequence[type[Exception]] = (Exception,)) -> Any:
        """What a function gives on the first rank, which alone calls it; JSON.

        Raises:
            Exception: what the function raised, on the first rank; a WorldError that says the same on the others.
        """
        if self.size == 1:
            return function()
        fault: Exception | None = None
        answer: Any = None
        if self.is_first:
            try:
                answer = {"value": function()}
            except tuple(faults) as error:
                fault, answer = error, {"fault": str(error)}
        answer = self.gather(answer)[0]
        if fault is not None:
            raise fault
        if "fault" in answer:
            raise WorldError(f"rank 0: {answer['fault']}")
        return answer["value"]

    def leave(self) -> None:
        """Closes the process group, if there is one."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = World()
"""Of a process that no launcher started."""


def _place(environment: Mapping[str, str]) -> tuple[int, int, int, str, int] | None:
    """Rank, world size, local rank, address and port; None in a process that no launcher started."""
    if "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in environment]:
            raise WorldError(f"WORLD_SIZE is set, but not {', '.join(missing)}; a launcher sets all of {names}")
        rank, size, local_rank, address, port = (environment[name] for name in names)
        return int(rank), int(size), int(local_rank), address, int(port)
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return (
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment["SLURM_LOCALID"]),
            environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
            int(environment.get("MASTER_PORT") or slurm_port(environment)),
        )
    return None


def first_host(nodes: str) -> str:
    """The first of a Slurm list of hosts, such as node[03-05,9],login1."""
    name, bracket, rest = re.match(r"([^\[,]+)(\[?)(.*)", nodes).groups()  # type: ignore[union-attr]
    return name + re.split(r"[-,\]]", rest)[0] if bracket else name


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port for a job step to meet at: the same on all its nodes, and another for the step after it."""
    return 20_000 + (int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])) % 20_000
