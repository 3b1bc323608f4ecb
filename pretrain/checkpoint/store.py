"""A run's checkpoints: commit, find the newest valid one, set invalid ones aside, keep the last few."""

import logging
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from data_pipeline.atomic import atomic_folder, staging
from pretrain.checkpoint.format import (
    CheckpointError,
    InvalidCheckpointError,
    Metadata,
    verify,
    write_data,
    write_metadata,
)
from pretrain.fragments import Fragment
from pretrain.world import ALONE, World

log = logging.getLogger(__name__)


class CheckpointConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """When checkpoints are written and how many stay. One is always written when a run ends or is interrupted."""

    every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=3, ge=1)
    """The newest checkpoints that are kept; older ones are deleted after a new one is on disk."""


class CheckpointStore:
    """The checkpoints in one folder, named by their step. All ranks of a run have one, and save together."""

    def __init__(self, folder: Path, keep: int, world: World = ALONE) -> None:
        self.folder = folder
        self._keep = keep
        self._world = world

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> Path:
        """Writes a checkpoint, which is there, whole and on disk, when this returns; then deletes the oldest.

        Args:
            fragments: that this rank owns.
            state: of the run; the first rank's is kept.
        """
        target = self.path(step)
        with ExitStack() as stack:
            folder = stack.enter_context(atomic_folder(target)) if self._world.is_first else staging(target)
            self._world.gather(None)  # the folder is there
            of_ranks = self._world.gather(write_data(folder, self._world.rank, fragments))
            if self._world.is_first:
                write_metadata(folder, of_ranks, state)
        self._world.gather(None)  # it is committed
        if self._world.is_first:
            for old in self.committed()[: -self._keep]:
                shutil.rmtree(old.rename(old.with_name(f"{old.name}.deleting")))  # half a checkpoint never looks whole
        return target

    def sweep(self) -> None:
        """Removes what a killed process was writing or deleting. For the run's own process, before it saves."""
        for suffix in ("partial", "deleting"):
            for left in self.folder.glob(f"step-*.{suffix}"):
                shutil.rmtree(left)

    def committed(self) -> list[Path]:
        """The checkpoints there are, oldest first; their content has not been verified."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if re.fullmatch(r"step-\d{8,}", p.name))

    def newest_valid(self, set_aside: bool) -> Metadata | None:
        """The newest checkpoint of which every byte is as written.

        Args:
            set_aside: whether invalid ones on the way are renamed, which is for the run's own process to do.

        Raises:
            CheckpointError: there are checkpoints and none is valid, or one cannot be read.
        """
        for path in reversed(self.committed()):
            try:
                return verify(path)
            except InvalidCheckpointError as error:
                log.warning("checkpoint %s is not valid: %s", path.name, error)
                if set_aside:
                    aside = path.with_name(f"{path.name}.invalid")
                    if aside.exists():
                        shutil.rmtree(aside)
                    path.rename(aside)
                    log.warning("it is set aside as %s", aside.name)
        if any(self.folder.glob("step-*")):
            raise CheckpointError(f"no checkpoint in {self.folder} is valid; remove the folder to begin anew")
        return None
