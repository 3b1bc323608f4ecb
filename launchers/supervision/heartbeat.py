"""Heartbeats: the phase of each rank of a supervised run, and its time.

    FOLDER/rank-00002.json     written by the rank's loop, so heartbeats end when the loop hangs
    FOLDER/rank-00002.stack    stacks of its threads, written on SIGQUIT

The supervisor names the folder in the environment, and so does `byteloom train` for several ranks in a terminal.
Without a folder, nothing is written. A heartbeat that cannot be written, as on a full disk, is skipped: a sign of life
never ends a rank.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from byteloom.core.storage.files import replace_file
from byteloom.core.storage.state_files import StateFileError, read_json

FOLDER = "BYTELOOM_HEARTBEATS"
"""Environment variable that names the folder of a supervised run."""
TERMINAL_FOLDER = "BYTELOOM_TERMINAL_HEARTBEATS"
"""Environment variable that names the folder of a run in a terminal."""
BEAT_SECONDS = 1.0
"""Least seconds between two heartbeats of one phase."""
BEATS_A_SECOND = 128
"""Most heartbeats of one phase that all ranks write in a second, to the file system that they share."""

Phase = Literal["start", "step", "evaluation", "checkpoint", "end"]


@dataclass(frozen=True)
class Beat:
    """Heartbeat of a rank."""

    phase: Phase
    step: int
    """Steps done."""
    node: str
    time: float
    """Seconds since 1970 by the node's clock."""
    code: int | None = None
    """Exit code of a rank that has ended."""


class Heartbeat:
    """Heartbeats of one rank.

    Args:
        folder: None for a rank that nobody watches.
        rank: its number.
        ranks: number of ranks.
        is_supervised: whether a supervisor starts the rank again, and not a person in a terminal.
    """

    def __init__(self, folder: Path | None, rank: int, *, ranks: int = 1, is_supervised: bool = False) -> None:
        self.is_supervised = is_supervised
        self._path = None if folder is None else beat_of(folder, rank)
        self.node = os.environ.get("SLURMD_NODENAME", platform.node())
        """Name of this machine, as the scheduler calls it."""
        self.seconds = max(BEAT_SECONDS, ranks / BEATS_A_SECOND)
        """Least seconds between two heartbeats of one phase."""
        self._last = ("", float("-inf"))

    @classmethod
    def of(cls, environment: Mapping[str, str], rank: int, ranks: int = 1) -> Self:
        """Return the heartbeats in the folder that the environment names."""
        return cls(folder_of(environment), rank, ranks=ranks, is_supervised=FOLDER in environment)

    @property
    def is_watched(self) -> bool:
        """Return whether a supervisor or a launcher reads the heartbeats of this rank."""
        return self._path is not None

    def beat(self, phase: Phase, step: int = 0) -> None:
        """Write a heartbeat if the phase is new or the last heartbeat is older than `seconds`."""
        now = time.monotonic()
        if phase != self._last[0] or now - self._last[1] >= self.seconds:
            self._last = (phase, now)
            self._write(Beat(phase, step, self.node, time.time()))

    def end(self, code: int) -> None:
        """Write the last heartbeat."""
        self._write(Beat("end", 0, self.node, time.time(), code))

    def _write(self, beat: Beat) -> None:
        if self._path is None:
            return
        with suppress(OSError):  # a full disk, or the run folder is gone, which the fence explains
            replace_file(self._path, json.dumps(asdict(beat)), durable=False)


def folder_of(environment: Mapping[str, str]) -> Path | None:
    """Return the folder of heartbeats that the environment names; None if nobody watches."""
    folder = environment.get(FOLDER) or environment.get(TERMINAL_FOLDER)
    return Path(folder) if folder else None


def beat_of(folder: Path, rank: int) -> Path:
    """Return the file of a rank's heartbeat."""
    return folder / f"rank-{rank:05d}.json"


def stack_of(folder: Path, rank: int) -> Path:
    """Return the file of a rank's stacks."""
    return folder / f"rank-{rank:05d}.stack"


def probe(folder: Path) -> None:
    """Write a file like a heartbeat.

    Raises:
        OSError: the folder takes no heartbeat now.
    """
    replace_file(folder / "probe", "a heartbeat can be written\n", durable=False)


def read_beat(folder: Path, rank: int) -> Beat | None:
    """Return a rank's last heartbeat; None before the first, or if the file is damaged. The next one replaces it."""
    with suppress(StateFileError):
        return read_json(beat_of(folder, rank), Beat, "the rank writes it again")
    return None
