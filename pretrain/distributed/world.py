"""The processes of one training run, and the little that they tell each other beside gradients.

A launcher starts the train entry once a rank and says which rank it is, in the environment variables of torchrun
(RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Under a bare `srun` they follow from Slurm's own. One process
without any of them is a world of its own, and needs no process group.
"""

import json
import os
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from byteloom.core.torch_compat import all_gather_single

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others before it gives up. A launcher ends them all much sooner when one has died."""
HANDSHAKE_SECONDS = 20.0
"""How long whoever listens where ranks meet may take to answer like one of them."""
COURTESY_SECONDS = 10.0
"""How long a rank that lost contact keeps it to itself. A launcher has ended it by then, and shows what came first."""


class WorldError(Exception):
    """The processes of a run do not come together, or have lost each other."""


class World:
    """This process among those of a run.

    Everything here goes by way of the hosts (gloo), whatever device the run computes on.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._group = group
        """None: the default one."""

    @classmethod
    def join(
        cls,
        device_type: str,
        environment: Mapping[str, str] = os.environ,
        *,
        meeting: timedelta = timedelta(minutes=5),
    ) -> Self:
        """Comes together with the other processes of the run that the environment speaks of.

        Args:
            device_type: cpu or cuda: what tensors of collectives will lie on, beside the hosts' memory.
            meeting: how long to wait until all are there.
        Raises:
            WorldError: the environment is wrong, or the others do not come.
        """
        place = place_of(environment)
        if place is None or place.size == 1:
            return cls()
        backend = _backend(device_type)
        # torchrun listens itself, so that ranks it starts again find it there.
        listens = place.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            with _hushed():
                store = _meet(place, listens, meeting)
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=PATIENCE)
        except (RuntimeError, ValueError, OSError) as error:  # torch's DistError is a RuntimeError
            raise WorldError(f"{place} cannot connect to the other ranks: {_first_line(error)}") from error
        return cls(place.rank, place.size, place.local_rank)

    @contextmanager
    def in_contact(self) -> Iterator[None]:
        """Collectives within fail in one line when another rank is gone.

        Raises:
            WorldError: it is. Not at once: the rank that failed speaks first.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_lost_contact(error):
                raise
            time.sleep(COURTESY_SECONDS)
            raise WorldError(
                f"rank {self.rank} of {self.size} lost contact with another rank: {_first_line(error)}"
            ) from error

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def beside(self) -> "World":
        """The same ranks with a way of their own to talk, for a thread that talks while the loop does. All call it."""
        if self.size == 1:
            return self
        return World(self.rank, self.size, self.local_rank, dist.new_group(backend="gloo", timeout=PATIENCE))

    def sum(self, *numbers: float) -> list[float]:
        """The sums over all ranks, in double precision: whole numbers up to 2^53 exactly."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return total.tolist()

    def gather_numbers(self, *numbers: float) -> list[list[float]]:
        """What each rank says, by rank, on all of them: as many numbers from each, in double precision."""
        own = torch.tensor(numbers, dtype=torch.float64)
        if self.size == 1:
            return [own.tolist()]
        told = torch.empty(self.size * len(numbers), dtype=torch.float64)
        all_gather_single(told, own)
        return told.view(self.size, -1).tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each rank says, by rank, on all of them. A value is JSON."""
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
            except Exception as error:
                fault, answer = error, {"fault": str(error)}
        answer = self.gather(answer)[0]
        if fault is not None:
            raise fault
        if "fault" in answer:
            raise WorldError(f"rank 0: {answer['fault']}")
        return answer["value"]

    def ensure_group(self, device_type: str) -> None:
        """Makes a process group of one for a process on its own, where a library asks for a group."""
        if not dist.is_initialized():
            dist.init_process_group(_backend(device_type), store=dist.HashStore(), rank=0, world_size=1)

    def leave(self) -> None:
        """Closes the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = World()
"""Of a process that no launcher started."""


def _backend(device_type: str) -> str:
    return "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"


class Place(NamedTuple):
    """Of one process among those that a launcher started."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    """Where the first rank waits for the others."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} at {self.address}:{self.port}"


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that a launcher gave this process; None if none did.

    Raises:
        WorldError: the environment is incomplete, or makes no sense.
    """
    if "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in environment]:
            raise WorldError(
                f"the environment has WORLD_SIZE but not {', '.join(missing)}; a launcher must set {', '.join(names)}"
            )
        rank, size, local_rank, port = (_number(environment, name) for name in names if name != "MASTER_ADDR")
        place = Place(rank, size, local_rank, environment["MASTER_ADDR"], port)
    elif _number(environment, "SLURM_STEP_NUM_TASKS", "1") > 1:
        place = Place(
            _number(environment, "SLURM_PROCID"),
            _number(environment, "SLURM_STEP_NUM_TASKS"),
            _number(environment, "SLURM_LOCALID"),
            environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "")),
            _number(environment, "MASTER_PORT", str(slurm_port(environment))),
        )
    else:
        return None
    if not (0 <= place.rank < place.size and 0 < place.port < 2**16):
        raise WorldError(f"these environment variables do not fit together: {place}")
    return place


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name) or default
    if not text.isdecimal():
        raise WorldError(f"the environment variable {name} is {text!r}; it must be a whole number")
    return int(text)


def first_host(nodes: str) -> str:
    """The first of a Slurm list of hosts, such as node[03-05,9],login1.

    Raises:
        WorldError: there is none.
    """
    first = re.match(r"([^\[,]|\[[^\]]*\])+", nodes)
    if first is None:
        raise WorldError(f"the environment variable SLURM_STEP_NODELIST is {nodes!r}; it must be a list of hosts")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port for a job step to meet at: the same on all its nodes, and another for the step after it."""
    step = _number(environment, "SLURM_JOB_ID") * 7 + _number(environment, "SLURM_STEP_ID")
    return 20_000 + step % 12_000  # below those that Linux gives to connections


def _meet(place: Place, listens: bool, limit: timedelta) -> dist.Store:
    """The store in which the ranks leave each other notes, once all of them are there.

    Raises:
        WorldError, RuntimeError, OSError: the place is taken, or some do not come.
    """
    deadline = time.monotonic() + limit.total_seconds()
    if not listens:
        _wait_for_listener(place, deadline)
    store = _connect(place, listens)
    store.set(f"here/{place.rank}", "")
    left = max(deadline - time.monotonic(), 1.0)
    try:
        store.wait([f"here/{rank}" for rank in range(place.size)], timedelta(seconds=left))
    except dist.DistStoreError as error:
        missing = [str(rank) for rank in range(place.size) if not store.check([f"here/{rank}"])]
        raise WorldError(f"{place}: missing after {limit.total_seconds():.0f} s: rank {', '.join(missing)}") from error
    return store


def _connect(place: Place, listens: bool) -> dist.Store:
    """The store, where there is a listener.

    Raises:
        WorldError: it is none of ours.
    """
    answers: queue.SimpleQueue[dist.Store | RuntimeError] = queue.SimpleQueue()

    def connect() -> None:
        try:
            answers.put(dist.TCPStore(place.address, place.port, is_master=listens, wait_for_workers=False))
        except RuntimeError as error:
            answers.put(error)

    # In a thread, as torch waits for ever for a listener that says nothing.
    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=HANDSHAKE_SECONDS)
    except queue.Empty:
        answer = RuntimeError("no answer")
    if not isinstance(answer, RuntimeError):
        return answer
    if not listens:
        raise WorldError(f"{place}: another program listens there; choose another MASTER_PORT") from answer
    if "EADDRINUSE" in str(answer):
        raise WorldError(f"{place}: another process uses this port; choose another MASTER_PORT") from answer
    raise answer


def _wait_for_listener(place: Place, deadline: float) -> None:
    """Returns once somebody listens where the ranks meet; torch would wait a multiple of its limit.

    Raises:
        OSError: nobody does in time.
    """
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


@contextmanager
def _hushed() -> Iterator[None]:
    """Within, native code writes nothing on standard error: what it has to say is in what it raises.

    Python's own lines still go there, from now on by another descriptor: a live line may hold on to its stream.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    sys.stderr = os.fdopen(kept, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)


def _is_lost_contact(error: RuntimeError) -> bool:
    """Whether this is what gloo or NCCL raise when another rank is gone: they say so in the text alone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
