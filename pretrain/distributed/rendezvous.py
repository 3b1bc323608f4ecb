"""Rendezvous: how the ranks of a run find each other.

A launcher gives each rank its place in the environment variables of torchrun (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT). Under a bare `srun`, the place follows from Slurm's own variables. Rank 0 listens at the
address, and the others connect to it.
"""

import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from byteloom.core.errors import CorrectableError
from launchers.slurm.hosts import expand_hosts

HANDSHAKE_SECONDS = 20.0
"""Deadline of the listener at the rendezvous to answer like a rank, if the ranks have that much time."""


class WorldError(CorrectableError):
    """The ranks of a run cannot connect, or have lost each other."""


class Place(NamedTuple):
    """Place of one rank among those that a launcher started."""

    rank: int
    size: int
    local_rank: int
    address: str
    """Host of rank 0."""
    port: int
    """Port at which rank 0 waits for the others."""

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} at {self.address}:{self.port}"


def place_of(environment: Mapping[str, str]) -> Place | None:
    """Return the place that a launcher gave this process; None if no launcher did.

    Raises:
        WorldError: the environment is incomplete or contradictory.
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
            environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", "")),
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


def _first_host(nodes: str) -> str:
    """Return the first host of a Slurm list.

    Raises:
        WorldError: there is none.
    """
    try:
        return expand_hosts(nodes)[0]
    except (IndexError, ValueError) as error:
        message = f"the environment variable SLURM_STEP_NODELIST is {nodes!r}; it must be a list of hosts"
        raise WorldError(message) from error


def slurm_port(environment: Mapping[str, str]) -> int:
    """Return the port of a job step's rendezvous: the same on all its nodes, another one for the next step."""
    step = _number(environment, "SLURM_JOB_ID") * 7 + _number(environment, "SLURM_STEP_ID")
    return 20_000 + step % 12_000  # below the ports that Linux gives to connections


def meet(place: Place, listens: bool, limit: timedelta) -> dist.Store:
    """Return the store that the ranks share, once all of them have arrived.

    Args:
        place: of this rank.
        listens: whether this rank is the listener.
        limit: deadline.

    Raises:
        WorldError: the port is taken, or ranks are missing.
        RuntimeError: torch cannot make the store.
        OSError: nobody listens.
    """
    deadline = time.monotonic() + limit.total_seconds()
    if not listens:
        _wait_for_listener(place, deadline)
    store = _connect(place, listens, deadline)
    store.set(f"here/{place.rank}", "")
    left = max(deadline - time.monotonic(), 1.0)
    try:
        store.wait([f"here/{rank}" for rank in range(place.size)], timedelta(seconds=left))
    except dist.DistStoreError as error:
        missing = [str(rank) for rank in range(place.size) if not store.check([f"here/{rank}"])]
        raise WorldError(f"{place}: missing after {limit.total_seconds():.0f} s: rank {', '.join(missing)}") from error
    return store


def _connect(place: Place, listens: bool, deadline: float) -> dist.Store:
    """Return the store of the listener.

    Raises:
        WorldError: another program listens, or uses the port.
    """
    answers: queue.SimpleQueue[dist.Store | RuntimeError] = queue.SimpleQueue()

    def connect() -> None:
        try:
            answers.put(dist.TCPStore(place.address, place.port, is_master=listens, wait_for_workers=False))
        except RuntimeError as error:
            answers.put(error)

    # In a thread, because torch waits for a silent listener without a deadline.
    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=min(HANDSHAKE_SECONDS, max(deadline - time.monotonic(), 1.0)))
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
    """Wait until somebody listens at the rendezvous; torch itself would wait a multiple of its limit.

    Raises:
        OSError: nobody listens before the deadline.
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
def quiet_native_stderr() -> Iterator[None]:
    """Discard what native code writes to standard error within; its errors carry the same text.

    Process-wide: file descriptor 2 is restored at the end. Python's own lines still reach standard error. From then on
    they use a duplicate of the descriptor, because a live line may keep a reference to its stream.
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


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).partition("\n")[0]
