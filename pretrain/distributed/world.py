"""The ranks of one training run, and the values that they exchange besides gradients.

A launcher starts the train entry once per rank (rendezvous.py says how a rank finds the others). One process that no
launcher started is a world of its own, and needs no process group.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist

from byteloom.core.torch_compat import all_gather_single
from pretrain.distributed.rendezvous import Place, WorldError, first_line, meet, place_of, quiet_native_stderr

__all__ = ["ALONE", "Place", "World", "WorldError", "place_of"]

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Time after which a rank that waits for others gives up. A launcher ends all ranks much sooner when one has died."""
LOST_CONTACT_SECONDS = 10.0
"""Delay before a rank reports lost contact. A launcher has ended it by then, and shows the first failure."""


class World:
    """This process among the ranks of a run.

    All methods communicate through the hosts (gloo), whatever device the run computes on.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._group = group
        """Process group; None is the default one."""

    @classmethod
    def join(
        cls,
        device_type: str,
        environment: Mapping[str, str] = os.environ,
        *,
        meeting: timedelta = timedelta(minutes=5),
    ) -> Self:
        """Connect to the other ranks of the run that the environment describes.

        Args:
            device_type: cpu or cuda: the device of tensors in collectives, besides the hosts' memory.
            environment: environment variables.
            meeting: deadline for all ranks to arrive.

        Raises:
            WorldError: the environment is wrong, or ranks are missing.
        """
        place = place_of(environment)
        if place is None or place.size == 1:
            return cls()
        backend = _backend(device_type)
        # torchrun's agent is the listener, so that ranks that it restarts find the same one.
        listens = place.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            with quiet_native_stderr():
                store = meet(place, listens, meeting)
            dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.size, timeout=COLLECTIVE_TIMEOUT
            )
        except (RuntimeError, ValueError, OSError) as error:  # torch's DistError is a RuntimeError
            raise WorldError(f"{place} cannot connect to the other ranks: {first_line(error)}") from error
        return cls(place.rank, place.size, place.local_rank)

    @contextmanager
    def in_contact(self) -> Iterator[None]:
        """Turn errors of collectives within into one line when another rank is gone.

        Raises:
            WorldError: another rank is gone. It is raised after a delay, so that the rank that failed is seen first.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_lost_contact(error):
                raise
            time.sleep(LOST_CONTACT_SECONDS)
            raise WorldError(
                f"rank {self.rank} of {self.size} lost contact with another rank: {first_line(error)}"
            ) from error

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    def with_own_group(self) -> "World":
        """Return the same ranks with a process group of their own, for use in a thread. All ranks call it."""
        if self.size == 1:
            return self
        return World(self.rank, self.size, self.local_rank, dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT))

    def sum(self, *numbers: float) -> list[float]:
        """Return the sums over all ranks, in double precision: exact for whole numbers up to 2^53."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def gather_numbers(self, *numbers: float) -> list[list[float]]:
        """Return the numbers of each rank by rank, in double precision. Each rank gives equally many."""
        own = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return [own.tolist()]
        gathered = torch.empty(self.size * len(numbers), dtype=torch.float64)
        all_gather_single(gathered, own)
        return gathered.view(self.size, -1).tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks by rank. A value is JSON."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(mine)]), group=self._group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(mine)] = mine
        all_padded = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(all_padded, padded, group=self._group)
        return [
            json.loads(data[: int(length)].numpy().tobytes()) for data, length in zip(all_padded, lengths, strict=True)
        ]

    def on_first(self, function: Callable[[], Any]) -> Any:
        """Call a function on rank 0 only, and return its result on all ranks. The result is JSON.

        Raises:
            Exception: on rank 0, the exception of the function; on the others, a WorldError with its text.
        """
        if self.size == 1:
            return function()
        fault: Exception | None = None
        answer: Any = None
        if self.is_first:
            try:
                answer = {"value": function()}
            except Exception as error:
                fault, answer = error, {"fault": str(error)}
        answer = self.gather(answer)[0]
        if fault is not None:
            raise fault
        if "fault" in answer:
            raise WorldError(f"rank 0: {answer['fault']}")
        return answer["value"]

    def ensure_group(self, device_type: str) -> None:
        """Make a process group of one rank if there is no group; some libraries need a group."""
        if not dist.is_initialized():
            dist.init_process_group(_backend(device_type), store=dist.HashStore(), rank=0, world_size=1)

    def leave(self) -> None:
        """Close the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = World()
"""World of a process that no launcher started."""


def _backend(device_type: str) -> str:
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def _is_lost_contact(error: RuntimeError) -> bool:
    """Return whether gloo or NCCL raised an error because another rank is gone. gloo only says so in the text."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
