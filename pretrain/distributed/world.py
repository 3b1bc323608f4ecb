"""The ranks of one training run, and the values that they exchange besides gradients.

A launcher starts the train entry once per rank (rendezvous.py says how a rank finds the others). One process that no
launcher started is a world of its own, and needs no process group.
"""

import json
import logging
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from byteloom.core.faults import FaultClass, class_for_ranks
from byteloom.core.torch_compat import all_gather_single, limit_device_waits
from pretrain.distributed.rendezvous import Place, WorldError, first_line, meet, place_of, quiet_native_stderr
from pretrain.distributed.transfers import Transfers

log = logging.getLogger(__name__)

__all__ = ["ALONE", "COLLECTIVE_TIMEOUT", "STEP_TIMEOUT", "Place", "World", "WorldError", "place_of"]

CPU = torch.device("cpu")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Time after which a rank that waits for others gives up. A launcher ends all ranks much sooner when one has died."""
STEP_TIMEOUT = timedelta(minutes=10)
"""The same for collectives of the device within a step, from the second step on. Ranks enter a step together."""
SOCKETS = 3
"""Sockets of a gloo process group, in addition to one for each rank."""
OTHER_FILES = 256
"""Largest number of other files that a rank opens."""
LOST_CONTACT_SECONDS = 10.0
"""Delay before a rank reports lost contact. A launcher has ended it by then, and shows the first failure."""


class World:
    """This process among the ranks of a run.

    `gather_numbers` uses the device that the run computes on; `sum_in_place` and `gather_tensor` that of their tensor.
    A device exchanges a few numbers of a thousand ranks in less than a millisecond. Other methods communicate through
    the hosts (gloo), where each rank passes on what all others send.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        group: dist.ProcessGroup | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._device = device
        self._transfers = Transfers(device)
        self._device_limit = COLLECTIVE_TIMEOUT
        self._group = group
        """Process group; None is the default one."""
        self._subgroups: dict[int, dist.ProcessGroup] = {}

    @classmethod
    def join(
        cls,
        device: torch.device,
        environment: Mapping[str, str] = os.environ,
        *,
        meeting: timedelta = timedelta(minutes=5),
    ) -> Self:
        """Connect to the other ranks of the run that the environment describes.

        Args:
            device: of tensors in collectives, besides the hosts' memory; on CUDA the current one.
            environment: environment variables.
            meeting: deadline for all ranks to arrive.

        Raises:
            WorldError: the environment is wrong, or ranks are missing.
        """
        place = place_of(environment)
        if place is None or place.size == 1:
            return cls(device=device)
        raise_file_limit(place.size)
        # torchrun's agent is the listener, so that ranks that it restarts find the same one.
        listens = place.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            with quiet_native_stderr():
                store = meet(place, listens, meeting)
            dist.init_process_group(
                _backend(device.type),
                store=store,
                rank=place.rank,
                world_size=place.size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError, OSError) as error:  # torch's DistError is a RuntimeError
            raise WorldError(f"{place} cannot connect to the other ranks: {first_line(error)}") from error
        return cls(place.rank, place.size, place.local_rank, device=device)

    @contextmanager
    def in_contact(self) -> Iterator[None]:
        """Replace errors of collectives within by one line if another rank is gone.

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

    def subgroup(self, size: int) -> dist.ProcessGroup:
        """Return the process group of this rank among groups of `size` consecutive ranks. All ranks call it."""
        if size not in self._subgroups:
            self._subgroups[size], _ = dist.new_subgroups(group_size=size, timeout=COLLECTIVE_TIMEOUT)
        return self._subgroups[size]

    def sum(self, *numbers: float) -> list[float]:
        """Return the sums over all ranks, in double precision: exact for whole numbers up to 2^53."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def sum_in_place(self, values: torch.Tensor) -> None:
        """Add up a tensor over all ranks, on the device that it is on. A GPU does so without the hosts."""
        if self.size > 1:
            dist.all_reduce(values, group=self._group)

    def gather_numbers(self, *numbers: float) -> list[list[float]]:
        """Return the numbers of each rank by rank, in double precision. Each rank gives equally many."""
        if self.size == 1:
            return [list(map(float, numbers))]
        with self.waits_for_hosts(), self._transfers.on_own_stream():
            own = self._transfers.send(np.array(numbers, np.float64)).take()[0]
            return self._transfers.fetch(self.gather_tensor(own)).wait().tolist()

    def gather_tensor(self, own: torch.Tensor) -> torch.Tensor:
        """Return the (n,) tensors of all ranks as (ranks, n), on their device. A GPU gathers without the hosts."""
        if self.size == 1:
            return own[None]
        gathered = own.new_empty(self.size * len(own))
        all_gather_single(gathered, own, group=self._group)
        return gathered.view(self.size, -1)

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

    def gather_on_first(self, content: bytes) -> list[bytes]:
        """Return the contents of all ranks by rank, on rank 0; the other ranks get nothing."""
        if self.size == 1:
            return [content]
        longest = torch.tensor([len(content)])
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self._group)
        padded = torch.zeros(8 + int(longest), dtype=torch.uint8)
        padded[:8] = torch.tensor([len(content)]).view(torch.uint8)
        padded[8 : 8 + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else 0
        of_ranks = [torch.empty_like(padded) for _ in range(self.size)] if self.is_first else None
        dist.gather(padded, of_ranks, 0, group=self._group)
        return [each[8 : 8 + int(each[:8].view(torch.long))].numpy().tobytes() for each in of_ranks or []]

    def exchange(self, sent: Tensor, sent_lengths: list[int], received_lengths: list[int]) -> Tensor:
        """Send each rank its part of a flat tensor, and return the parts that all ranks sent to this one, by rank.

        Args:
            sent: in the hosts' memory; the parts follow each other.
            sent_lengths: lengths of its parts, by rank.
            received_lengths: lengths of the parts that this rank gets, by rank.
        """
        received = torch.empty(sum(received_lengths), dtype=sent.dtype)
        dist.all_to_all_single(received, sent, received_lengths, sent_lengths, group=self._group)
        return received

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
                fault, answer = error, {"fault": str(error), "class": class_for_ranks(error)}
        answer = self._from_first(answer)
        if fault is not None:
            raise fault
        if "fault" in answer:
            lost = WorldError(f"rank 0: {answer['fault']}")
            lost.fault = answer["class"] and FaultClass(answer["class"])
            raise lost
        return answer["value"]

    def _from_first(self, value: Any) -> Any:
        """Return rank 0's value on all ranks. A value is JSON."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0, group=self._group)
        if not self.is_first:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._group)
        return value if self.is_first else json.loads(data.numpy().tobytes())

    def ensure_group(self, device_type: str) -> None:
        """Make a process group of one rank if there is no group; some libraries need a group."""
        if not dist.is_initialized():
            dist.init_process_group(_backend(device_type), store=dist.HashStore(), rank=0, world_size=1)

    def use_device(self) -> None:
        """Make the run's device the current one of this thread. A new thread begins with the machine's first device."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def limit_device_waits(self, limit: timedelta) -> None:
        """Set how long later collectives of the device may take. NCCL writes what hung when the time is over."""
        self._device_limit = limit
        self._limit_device_waits(limit)

    def _limit_device_waits(self, limit: timedelta) -> None:
        if self.size > 1 and self._device.type == "cuda":
            limit_device_waits(limit)

    @contextmanager
    def waits_for_hosts(self) -> Iterator[None]:
        """Let collectives of the device within wait as long as those of hosts: another rank may wait for its disk."""
        self._limit_device_waits(COLLECTIVE_TIMEOUT)
        yield
        self._limit_device_waits(self._device_limit)

    def leave(self) -> None:
        """Close the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = World()
"""World of a process that no launcher started."""


def raise_file_limit(ranks: int) -> None:
    """Let this process open as many files as the sockets of its ranks need, as far as the system permits.

    gloo connects each rank with each other one, in the group of the steps and in the group of the checkpoints.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * (ranks + SOCKETS) + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit < needed:
        log.warning(
            "%d ranks need %d open files, and the system permits %d (ulimit -Hn); a start may fail",
            ranks,
            needed,
            limit,
        )


def _backend(device_type: str) -> str:
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


def _is_lost_contact(error: RuntimeError) -> bool:
    """Return whether gloo or NCCL raised an error because another rank is gone. gloo only says so in the text."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
