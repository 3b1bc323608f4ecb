"""The run folder, whose content explains the run.

ROOT/NAME/
    config.yaml        the resolved recipe of the last start
    train.log          what was said; train.rank-00001.log and so on, by the other ranks
    metrics.jsonl      one line a step
    run.json           the run's identity
    generation         how often the run has been started; see fence.py
    mlflow.json        how far the tracker has been told
    checkpoints/       step-00001200/, …, unless the recipe has another home for them
    profile/           rank-00000/, …, if the recipe asks for it
"""

import fcntl
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
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

    def log_of(self, rank: int) -> Path:
        """What a rank said."""
        return self.path / (f"train.rank-{rank:05d}.log" if rank else "train.log")

    def profile_of(self, rank: int) -> Path:
        """What a rank's profiler found."""
        return self.path / "profile" / f"rank-{rank:05d}"

    @property
    def checkpoints(self) -> Path | str:
        """Where its checkpoints lie, as the recipe of its last start has it: a folder, or a URL."""
        recipe = yaml.safe_load(self.config.read_text(encoding="utf-8")) if self.config.exists() else {}
        return self.checkpoints_in(recipe.get("checkpoint", {}).get("home"))

    def checkpoints_in(self, home: str | None) -> Path | str:
        """Where they lie if the recipe has this `checkpoint.home`."""
        return self.path / "checkpoints" if home is None else f"{home.rstrip('/')}/{self.path.name}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder if need be, and holds it for this process alone.

        Raises:
            RunFolderError: another process holds it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunFolderError(f"cannot write to the run folder {self.path}: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(f"another process is training in {self.path}; choose another run.name") from error
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
