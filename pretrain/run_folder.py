"""The run folder, whose content explains the run.

ROOT/NAME/
    config.yaml        the resolved recipe of the last start
    train.log          what was said; train.rank-00001.log and so on, by the other ranks
    metrics.jsonl      one line a step
    run.json           the run's identity
    generation         how often the run has been started; see fence.py
    mlflow.json        how far the tracker has been told
    checkpoints/       step-00001200/, …
    profile/           rank-00000/, …, if the recipe asks for it

What `byteloom submit` adds is told in launchers/submission.py.
"""

import fcntl
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, Field

from data_pipeline.atomic import replace_file


class RunConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Where a run lives."""

    root: str = "runs"
    """Folder of all runs; the embedded MLflow store lies here too."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder under the root. A start with the name of a run that is there continues it."""


class RunFolderError(Exception):
    """The run folder cannot be used."""


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.generation = path / "generation"
        self.metrics = path / "metrics.jsonl"
        self.mlflow = path / "mlflow.json"
        self.checkpoints = path / "checkpoints"

    def log_of(self, rank: int) -> Path:
        """What a rank said."""
        return self.path / (f"train.rank-{rank:05d}.log" if rank else "train.log")

    def profile_of(self, rank: int) -> Path:
        """What a rank's profiler found."""
        return self.path / "profile" / f"rank-{rank:05d}"

    @contextmanager
    def locked(self, take_over: bool = False) -> Iterator[None]:
        """Makes the folder if need be, and holds it for this process alone.

        Args:
            take_over: from a process that a scheduler gave up for lost; the fence keeps it from writing.
        Raises:
            RunFolderError: another process holds it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
            if take_over and not _hold(lock):
                lock.close()
                (self.path / ".lock").unlink()
                lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunFolderError(f"cannot write to the run folder {self.path}: {error.strerror}") from error
        with lock:
            if not _hold(lock):
                raise RunFolderError(f"another process is training in {self.path}; choose another run.name")
            yield

    def identity(self, made_of: dict[str, Any]) -> dict[str, Any]:
        """What the run was when its first number was written, with an id that the tracker finds its run again by.

        Args:
            made_of: model, data and fingerprint of this start; kept if nothing has come of an earlier one.
        """
        path = self.path / "run.json"
        if path.exists():
            identity: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            begun = self.metrics.exists() and self.metrics.stat().st_size
            if begun or identity == {"id": identity["id"], **made_of}:
                return identity
        identity = {"id": uuid.uuid4().hex, **made_of}
        replace_file(path, json.dumps(identity, indent=1))
        return identity


def _hold(lock: IO[str]) -> bool:
    """Whether this process holds the lock now."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
