"""The run folder, whose content explains the run.

ROOT/NAME/
    config.yaml        the resolved recipe of the last start
    config.source.json the recipe that a person named, and the commits of its repository and of Byteloom
    train.log          what was said; train.rank-00001.log and so on, by the other ranks
    metrics.jsonl      one line a step
    run.json           the run's identity
    generation         how often the run has been started; see fence.py
    mlflow.json        how far the tracker has been told
    checkpoints/       step-00001200/, …, unless the recipe has another home for them
    profile/           rank-00000/, …, if the recipe asks for it

What `byteloom submit` adds is told in launchers/submission.py.
"""

import fcntl
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, Field, field_validator

from byteloom.core.files import replace_file
from byteloom.core.locations import LocationText
from byteloom.core.state_files import StateFileError, read_json, read_yaml

log = logging.getLogger(__name__)

NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"
"""Pattern of a run's name."""
PATIENCE = 0.5
"""Seconds that a start waits for the folder: whoever asks whether it is held, holds it for a moment."""


class RunConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Where a run lives."""

    root: LocationText = "runs"
    """Folder of all runs; the embedded MLflow store lies here too. A leading ~ is the home folder, here and in every
    field that holds a path."""
    name: str = Field(json_schema_extra={"pattern": f"^{NAME}$"})
    """The run's folder under the root. A start with the name of a run that is there continues it."""

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if not re.fullmatch(NAME, name):
            raise ValueError("it must have only letters, digits, . _ and -, and begin with a letter or a digit")
        return name


class RunFolderError(Exception):
    """The run folder cannot be used."""


class _StoredIdentity(BaseModel, extra="allow"):
    """run.json: what a run began as."""

    id: str
    """The word by which the tracker finds the run again."""
    model: dict[str, Any]
    data: dict[str, Any]
    fingerprint: str
    precision: str | None = None
    """Precision of the last start."""


class _StoredTrain(BaseModel):
    steps: int


class _StoredCheckpoint(BaseModel):
    home: str | None = None


class _StoredEngine(BaseModel):
    precision: str = "auto"


class StoredRecipe(BaseModel):
    """The fields of config.yaml that are read without the rest of it."""

    train: _StoredTrain
    engine: _StoredEngine = _StoredEngine()
    checkpoint: _StoredCheckpoint = _StoredCheckpoint()


def read_recipe(path: Path) -> StoredRecipe | None:
    """Return the main fields of a run's resolved recipe; None where there is no such file.

    Raises:
        StateFileError: the file cannot be read, or is damaged.
    """
    return read_yaml(path, StoredRecipe, "restore it, or start the run again with its recipe, which writes it")


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.generation = path / "generation"
        self.metrics = path / "metrics.jsonl"
        self.mlflow = path / "mlflow.json"
        self.lock = path / ".lock"

    def log_of(self, rank: int) -> Path:
        """What a rank said."""
        return self.path / (f"train.rank-{rank:05d}.log" if rank else "train.log")

    def profile_of(self, rank: int) -> Path:
        """What a rank's profiler found."""
        return self.path / "profile" / f"rank-{rank:05d}"

    @property
    def checkpoints(self) -> Path | str:
        """Where its checkpoints lie, as the recipe of its last start has it: a folder, or a URL.

        Raises:
            StateFileError: config.yaml cannot be read, or is damaged.
        """
        recipe = read_recipe(self.config)
        return self.checkpoints_in(None if recipe is None else recipe.checkpoint.home)

    def checkpoints_in(self, home: str | None) -> Path | str:
        """Where they lie if the recipe has this `checkpoint.home`."""
        return self.path / "checkpoints" if home is None else f"{home.rstrip('/')}/{self.path.name}"

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
            lock = self.lock.open("a")
            if take_over and not _comes_free(lock):
                lock.close()
                self.lock.unlink()
                lock = self.lock.open("a")
        except OSError as error:
            raise RunFolderError(f"cannot write to the run folder {self.path}: {error.strerror}") from error
        with lock:
            if not _comes_free(lock):
                raise RunFolderError(f"another process is training in {self.path}; choose another run.name")
            lock.truncate(0)
            lock.write(f"{os.uname().nodename} {os.getpid()}\n")
            lock.flush()
            yield

    def holder(self) -> tuple[str, int] | None:
        """The host and process that hold the folder; None if nobody does, as far as this machine can tell.

        An empty host means that the lock is held by a process that is not known.
        """
        if not self.lock.exists():
            return None
        with self.lock.open(encoding="utf-8", errors="replace") as lock:
            if _is_locked(lock, fcntl.LOCK_SH):
                return None
            text = lock.read()
        if not text:  # it is just being begun
            return None
        holder = re.fullmatch(r"(\S+) ([0-9]{1,9})\n", text)
        return (holder[1], int(holder[2])) if holder else ("", 0)

    def stored_identity(self) -> dict[str, Any] | None:
        """Return what run.json holds; None for a folder in which no run has begun.

        Raises:
            StateFileError: the file cannot be read, or is damaged.
        """
        advice = (
            "restore it from a copy, or remove it and start with the recipe in config.yaml beside it: the run then "
            "continues from its checkpoints, and is a new run in MLflow"
        )
        stored = read_json(self.path / "run.json", _StoredIdentity, advice)
        return None if stored is None else stored.model_dump(exclude_unset=True)

    def identity(self, made_of: dict[str, Any]) -> dict[str, Any]:
        """What the run was when its first number was written, with an id that the tracker finds its run again by.

        Args:
            made_of: model, data and fingerprint of this start; kept if nothing has come of an earlier one.

        Raises:
            StateFileError: run.json cannot be read, or is damaged.
        """
        stored = self.stored_identity()
        if stored is not None:
            begun = self.metrics.exists() and self.metrics.stat().st_size
            if begun or made_of.items() <= stored.items():
                return stored
        identity = {"id": uuid.uuid4().hex, **made_of}
        replace_file(self.path / "run.json", json.dumps(identity, indent=1))
        return identity

    def earlier_precision(self, identity: dict[str, Any]) -> str | None:
        """Return the precision of the run's last start; None if this is the first, or if it had chosen none."""
        if "precision" in identity:
            return identity["precision"]
        try:
            recipe = read_recipe(self.config)  # an older version's
        except StateFileError as error:
            log.warning("%s; this start does so", error)
            return None
        return None if recipe is None or recipe.engine.precision == "auto" else recipe.engine.precision

    def keep_precision(self, identity: dict[str, Any], precision: str) -> None:
        """Note the precision of this start in run.json, for the starts that follow."""
        if identity.get("precision") != precision:
            replace_file(self.path / "run.json", json.dumps(identity | {"precision": precision}, indent=1))


def _comes_free(lock: TextIO) -> bool:
    """Waits for a lock for a moment; says whether this process has it."""
    deadline = time.monotonic() + PATIENCE
    while not _is_locked(lock, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _is_locked(file: TextIO, how: int) -> bool:
    """Locks a file if it can be at once, and says whether it was."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
