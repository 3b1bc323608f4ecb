"""A run's checkpoints: save behind training, commit, find the newest valid one, set invalid ones aside, keep some.

    fragments ─▶ staging buffer ─▶ rank-00000.bin, rank-00001.bin, … in step-N.partial ─▶ metadata.json ─▶ step-N
      live         a copy             each rank its own, on disk, digested                 the first rank     one rename

The loop waits for the copy alone. What follows is done by a thread of each rank, and the threads talk by a process
group of their own.
"""

import logging
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
from pretrain.world import ALONE, World, WorldError

log = logging.getLogger(__name__)


class CheckpointConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """When checkpoints are written and how many stay. One is always written when a run ends or is interrupted."""

    every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=3, ge=1)
    """The newest checkpoints that are kept; older ones are deleted after a new one is on disk."""
    keep_every: int | None = Field(default=None, ge=1)
    """Beside those, checkpoints of steps that are multiples of this are kept for ever."""
    asynchronous: bool = True
    """Write behind training. It takes a copy of what a rank owns of masters and moments in the host's memory."""


class CheckpointStore:
    """The checkpoints in one folder, named by their step. All ranks of a run have one, and call it alike.

    Args:
        keep, keep_every: as of CheckpointConfig.
        fence: called before anything is written; raises if this process may not write any more.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        world: World = ALONE,
        *,
        keep_every: int | None = None,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._keep, self._keep_every = keep, keep_every
        self._world = world.beside()
        self._fence = fence
        self._staged = torch.empty(0)
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> Path:
        """Writes a checkpoint, which is there, whole and on disk, when this returns; then deletes the oldest.

        Args:
            fragments: that this rank owns.
            state: of the run; the first rank's is kept.
        Raises:
            CheckpointError: a rank could not write it; on all ranks, and the one before is as it was.
        """
        self.begin(step, fragments, state)
        self.finish()
        return self.path(step)

    def begin(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> None:
        """As `save`, but returns when the fragments are copied. Waits for the save before to end first.

        Raises:
            CheckpointError: the save before failed; this one has not begun.
        """
        self.finish()
        staged = self._stage(fragments)
        self._thread = threading.Thread(target=self._write_behind, args=(step, staged, state), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for the save under way, if there is one.

        Raises:
            CheckpointError: it failed.
        """
        if self._thread is None:
            return
        self._thread.join()
        fault, self._thread, self._fault = self._fault, None, None
        if fault is not None:
            raise CheckpointError(f"no checkpoint could be written: {fault}") from fault

    def _stage(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The fragments as they are now, in a buffer that is used again."""
        lengths = [len(fragment.data) for fragment in fragments]
        if len(self._staged) != sum(lengths):
            on_cuda = any(fragment.data.is_cuda for fragment in fragments)
            self._staged = torch.empty(sum(lengths), pin_memory=on_cuda)
        staged = []
        for fragment, data in zip(fragments, self._staged.split(lengths), strict=True):
            data.copy_(fragment.data, non_blocking=True)
            staged.append(Fragment(fragment.name, fragment.shape, fragment.start, data))
        if self._staged.is_pinned():
            torch.cuda.synchronize()
        return staged

    def _write_behind(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> None:
        try:
            self._write(self.path(step), fragments, state)
            log.info("checkpoint %s", self.path(step))
        except Exception as error:  # told at once, and raised by `finish`
            self._fault = error
            log.error("checkpoint of step %d: %s", step, error)

    def _write(self, target: Path, fragments: Sequence[Fragment], state: dict[str, Any]) -> None:
        world = self._world
        with ExitStack() as stack:

            def begin() -> None:
                self._fence()
                stack.enter_context(atomic_folder(target))

            def commit() -> None:
                write_metadata(staging(target), [told["tensors"] for told in of_ranks], state)
                self._fence()
                stack.close()

            world.on_first(begin)
            of_ranks = world.gather(self._tried(staging(target), fragments))
            for rank, told in enumerate(of_ranks):
                if "fault" in told:
                    raise WorldError(f"rank {rank}: {told['fault']}")
            world.on_first(commit)
        if world.is_first:
            self.prune()

    def _tried(self, folder: Path, fragments: Sequence[Fragment]) -> dict[str, Any]:
        """What this rank wrote, or why it could not, as JSON."""
        try:
            self._fence()
            return {"tensors": write_data(folder, self._world.rank, fragments)}
        except Exception as error:
            return {"fault": str(error)}

    def prune(self) -> list[Path]:
        """Deletes the checkpoints that need not be kept; returns those that were."""
        old = [path for path in self.committed()[: -self._keep] if not self._is_kept_for_ever(path)]
        for path in old:
            shutil.rmtree(path.rename(path.with_name(f"{path.name}.deleting")))  # half a one never looks whole
        return old

    def _is_kept_for_ever(self, path: Path) -> bool:
        return self._keep_every is not None and step_of(path) % self._keep_every == 0

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
        """The newest checkpoint of which every byte is as written. Each rank looks at a part of it, and all agree.

        Args:
            set_aside: whether invalid ones on the way are renamed, which is for the run's own processes to do.

        Raises:
            CheckpointError: there are checkpoints and none is valid, or one cannot be read.
        """
        world = self._world
        for name in world.on_first(lambda: [path.name for path in reversed(self.committed())]):
            path = self.folder / name
            metadata, invalid, unreadable = None, None, None
            try:
                metadata = verify(path, world.rank, world.size)
            except InvalidCheckpointError as error:
                invalid = str(error)
            except (CheckpointError, OSError) as error:
                unreadable = str(error)
            told = world.gather([invalid, unreadable])
            if not_read := [text for _, text in told if text is not None]:
                raise CheckpointError(not_read[0])
            faults = [text for text, _ in told if text is not None]
            if not faults:
                return metadata
            log.warning("checkpoint %s is not valid: %s", name, faults[0])
            if set_aside:
                world.on_first(partial(self._set_aside, path))
        if world.on_first(lambda: any(self.folder.glob("step-*"))):
            raise CheckpointError(f"no checkpoint in {self.folder} is valid; remove the folder to begin anew")
        return None

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(f"{path.name}.invalid")
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        log.warning("it is set aside as %s", aside.name)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))
