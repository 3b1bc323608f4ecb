"""Signs of life: what each rank of a supervised run is at, and since when.

    FOLDER/rank-00002.json     written by the rank's loop, so that they end when the loop hangs
    FOLDER/rank-00002.stack    where its threads are, written when SIGQUIT asks for it

The folder is named in the environment by whoever looks after the ranks; without it nothing is written.
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
"""The environment variable that names the folder."""
BEAT_SECONDS = 1.0
"""Beats of one phase are so far apart, at least."""

Phase = Literal["start", "step", "evaluation", "checkpoint", "end"]


@dataclass(frozen=True)
class Beat:
    """What a rank was at when it last beat."""

    phase: Phase
    step: int
    """Steps done."""
    node: str
    time: float
    """Seconds since 1970 by the node's clock."""
    code: int | None = None
    """The exit code, of a rank that has come to its end."""


class Heartbeat:
    """One rank's.

    Args:
        folder: None for a rank that nobody looks after.
    """

    def __init__(self, folder: Path | None, rank: int) -> None:
        self._path = None if folder is None else beat_of(folder, rank)
        self._node = os.environ.get("SLURMD_NODENAME", platform.node())
        self._last = ("", float("-inf"))

    @classmethod
    def of(cls, environment: Mapping[str, str], rank: int) -> Self:
        """In the folder that the environment names."""
        folder = environment.get(FOLDER)
        return cls(Path(folder) if folder else None, rank)

    @property
    def is_watched(self) -> bool:
        """Whether somebody looks after this rank."""
        return self._path is not None

    def beat(self, phase: Phase, step: int = 0) -> None:
        """Called by the loop as often as it likes; writes now and then, and whenever the phase is another."""
        now = time.monotonic()
        if phase != self._last[0] or now - self._last[1] >= BEAT_SECONDS:
            self._last = (phase, now)
            self._write(Beat(phase, step, self._node, time.time()))

    def end(self, code: int) -> None:
        """The last beat."""
        self._write(Beat("end", 0, self._node, time.time(), code))

    def _write(self, beat: Beat) -> None:
        if self._path is None:
            return
        with suppress(FileNotFoundError):  # the run folder is gone, which the fence explains
            replace_file(self._path, json.dumps(asdict(beat)), durable=False)


def beat_of(folder: Path, rank: int) -> Path:
    """Where a rank beats."""
    return folder / f"rank-{rank:05d}.json"


def stack_of(folder: Path, rank: int) -> Path:
    """Where a rank says where its threads are."""
    return folder / f"rank-{rank:05d}.stack"


def read_beat(folder: Path, rank: int) -> Beat | None:
    """Return a rank's last beat; None before its first, and where the file is damaged: the next beat replaces it."""
    with suppress(StateFileError):
        return read_json(beat_of(folder, rank), Beat, "the rank writes it again")
    return None
