"""Heartbeats: the phase of each rank of a supervised run, and its time.

    FOLDER/rank-00002.json     written by the rank's loop, so heartbeats end when the loop hangs
    FOLDER/rank-00002.stack    stacks of its threads, written on SIGQUIT

The supervisor names the folder in the environment. Without it, nothing is written.
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

from byteloom.core.files import replace_file
from byteloom.core.state_files import StateFileError, read_json

FOLDER = "BYTELOOM_HEARTBEATS"
"""Environment variable that names the folder."""
BEAT_SECONDS = 1.0
"""Least seconds between two heartbeats of one phase."""

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
        folder: None for a rank without a supervisor.
        rank: its number.
    """

    def __init__(self, folder: Path | None, rank: int) -> None:
        self._path = None if folder is None else beat_of(folder, rank)
        self._node = os.environ.get("SLURMD_NODENAME", platform.node())
        self._last = ("", float("-inf"))

    @classmethod
    def of(cls, environment: Mapping[str, str], rank: int) -> Self:
        """Return the heartbeats in the folder that the environment names."""
        folder = environment.get(FOLDER)
        return cls(Path(folder) if folder else None, rank)

    @property
    def is_watched(self) -> bool:
        """Whether a supervisor watches this rank."""
        return self._path is not None

    def beat(self, phase: Phase, step: int = 0) -> None:
        """Write a heartbeat if the phase is new or the last heartbeat is older than BEAT_SECONDS."""
        now = time.monotonic()
        if phase != self._last[0] or now - self._last[1] >= BEAT_SECONDS:
            self._last = (phase, now)
            self._write(Beat(phase, step, self._node, time.time()))

    def end(self, code: int) -> None:
        """Write the last heartbeat."""
        self._write(Beat("end", 0, self._node, time.time(), code))

    def _write(self, beat: Beat) -> None:
        if self._path is None:
            return
        with suppress(FileNotFoundError):  # the run folder is gone, which the fence explains
            replace_file(self._path, json.dumps(asdict(beat)), durable=False)


def beat_of(folder: Path, rank: int) -> Path:
    """Return the file of a rank's heartbeat."""
    return folder / f"rank-{rank:05d}.json"


def stack_of(folder: Path, rank: int) -> Path:
    """Return the file of a rank's stacks."""
    return folder / f"rank-{rank:05d}.stack"


def read_beat(folder: Path, rank: int) -> Beat | None:
    """Return a rank's last heartbeat; None before the first, or if the file is damaged. The next one replaces it."""
    with suppress(StateFileError):
        return read_json(beat_of(folder, rank), Beat, "the rank writes it again")
    return None
