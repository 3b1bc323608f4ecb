"""Checkpoints of a run: save during training, commit, load the newest valid one, quarantine invalid ones, keep some.

    fragments ─▶ staging buffer ─▶ rank-00000.bin, rank-00001.bin, … ─▶ layout.json ─▶ metadata.json
      live         a copy             each rank its own, durable            the first rank: commit

    newest checkpoint ─▶ staging buffer ─▶ all ranks found it valid ─▶ fragments
      or the one before      digests          or they try the one before

The loop continues at once. Its next passes change no copied value, and its next update waits for the copy. A thread of
each rank does the rest; these threads have a process group of their own.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from byteloom.core.locations import Location, LocationText
from byteloom.core.progress import Progress, ignore
from byteloom.core.step_folders import step_in, step_name
from pretrain.checkpoint.data import (
    bytes_of,
    copy,
    fill,
    host_buffer,
    metadata_in,
    read_verified,
    verify_data,
    write_file,
)
from pretrain.checkpoint.errors import CheckpointError, InvalidCheckpointError
from pretrain.checkpoint.format import (
    LAYOUT,
    Metadata,
    Owned,
    StoredFile,
    encode_layout,
    encode_metadata,
    owned_ranges,
)
from pretrain.checkpoint.home import committed, open_home
from pretrain.distributed.fragments import Fragment
from pretrain.distributed.world import ALONE, World, WorldError

log = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """When checkpoints are written and how many stay. One is always written when a run ends or is interrupted."""

    every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep: int | None = Field(default=3, ge=1)
    """Number of newest valid checkpoints that are kept. Older ones are deleted after a new one is on disk. Null keeps
    all."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep checkpoints of steps that are multiples of this."""
    asynchronous: bool = True
    """Write during training. This needs a copy of a rank's masters and moments in host memory."""
    home: LocationText | None = None
    """Folder or URL, such as s3://bucket/folder, with a folder of checkpoints for each run, by its name. A new run
    folder finds them there. Null is the run folder."""


class CheckpointStore:
    """Checkpoints of one run, named by their step. All ranks call the same methods.

    Args:
        home: a folder or URL.
        keep: as in CheckpointConfig.
        world: the ranks of the run.
        keep_every: as in CheckpointConfig.
        fence: called before anything is written; raises if this process may no longer write.

    Raises:
        CheckpointError: the home cannot be used.
    """

    def __init__(
        self,
        home: str | Location,
        keep: int | None,
        world: World = ALONE,
        *,
        keep_every: int | None = None,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self._home = open_home(home)
        self._keep, self._keep_every = keep, keep_every
        self._world = world.with_own_group()
        self._fence = fence
        self._staged = torch.empty(0)
        self._stager = ThreadPoolExecutor(1, "stager")
        self._staging: Future[Tensor] | None = None
        """Copy of the save in progress."""
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None
        self._owned: Owned | None = None
        self._layout = b""
        """Layout of the ranges that ranks own; on the first rank."""
        self._found_valid: set[str] = set()
        """Names of the checkpoints that this start wrote or verified."""

    @property
    def folder(self) -> Location:
        """Home of the checkpoints."""
        return self._home.location

    def path(self, step: int) -> Location:
        """Return the place of the checkpoint of a step."""
        return self.folder / step_name(step)

    def save(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> Location:
        """Write a checkpoint, then delete the oldest. It is whole and on disk when this returns.

        Args:
            step: of the checkpoint.
            fragments: that this rank owns.
            state: of the run; that of the first rank is written.

        Raises:
            CheckpointError: a rank could not write it; on all ranks. Earlier checkpoints are unchanged.
        """
        self.begin(step, fragments, state)
        self.finish()
        return self.path(step)

    def begin(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> None:
        """Start a save, and return at once. Fragments must not change until `wait_for_copy` has returned.

        Waits for the end of the previous save first. The arguments are those of `save`.

        Raises:
            CheckpointError: the previous save failed; this one was not started.
        """
        self.finish()
        self._staging = self._stager.submit(self._stage, fragments)
        arguments = (self.path(step).name, self._staging, owned_ranges(fragments), state)
        self._thread = threading.Thread(target=self._write_behind, args=arguments, daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Wait until the fragments of the save in progress may change."""
        if self._staging is not None:
            wait([self._staging])

    def finish(self) -> None:
        """Wait for the save in progress.

        Raises:
            CheckpointError: the save failed.
        """
        if self._thread is None:
            return
        self._thread.join()
        fault, self._thread, self._fault, self._staging = self._fault, None, None, None
        if fault is not None:
            raise CheckpointError(f"cannot write a checkpoint: {fault}") from fault

    def _stage(self, fragments: Sequence[Fragment]) -> Tensor:
        """Return the present values, one fragment after another, in a reused buffer."""
        values = self._buffer(fragments)
        lengths = [len(fragment.data) for fragment in fragments]
        copy(values.split(lengths), [fragment.data for fragment in fragments])
        return values

    def _buffer(self, fragments: Sequence[Fragment]) -> Tensor:
        length = sum(len(fragment.data) for fragment in fragments)
        if len(self._staged) != length:
            self._staged = torch.empty(0)  # free the old buffer before the new one is made
            on_cuda = any(fragment.data.is_cuda for fragment in fragments)
            self._staged = torch.empty(length, pin_memory=True) if on_cuda else host_buffer(length)
        return self._staged

    def _write_behind(self, name: str, staging: Future[Tensor], owned: Owned, state: dict[str, Any]) -> None:
        try:
            self._write(name, staging, owned, state)
            log.info("checkpoint %s", self.folder / name)
        except Exception as error:  # logged at once, and raised by `finish`
            self._fault = error
            log.error("cannot write the checkpoint of step %d: %s", step_in(name), error)
            return
        try:
            self.prune()
        except Exception as error:
            log.warning("cannot delete old checkpoints: %s", error)

    def _write(self, name: str, staging: Future[Tensor], owned: Owned, state: dict[str, Any]) -> None:
        world = self._world
        self._plan(owned)
        draft = world.on_first(lambda: self._begin(name))
        try:
            of_ranks = world.gather(self._tried(draft, staging))
            for rank, told in enumerate(of_ranks):
                if "fault" in told:
                    raise WorldError(f"rank {rank}: {told['fault']}")
            world.on_first(lambda: self._commit(name, draft, [told["file"] for told in of_ranks], state))
        except Exception:
            if world.is_first:
                with contextlib.suppress(OSError):
                    self._home.abandon(draft)
            raise
        self._found_valid.add(name)

    def _plan(self, owned: Owned) -> None:
        """Send the ranges that each rank owns to the first rank, if they changed since the last save."""
        world = self._world
        if any(world.sum(owned != self._owned)):
            of_ranks = world.gather(owned)
            world.on_first(lambda: self._keep_layout(of_ranks))
            self._owned = owned

    def _keep_layout(self, of_ranks: Sequence[Owned]) -> None:
        self._layout = encode_layout(of_ranks)

    def _begin(self, name: str) -> str:
        self._fence()
        try:
            return self._home.begin(name)
        except FileExistsError:  # at a URL: the marker of a fenced start, without the files that it marks
            try:
                verify_data(metadata_in(self._home, name))
            except InvalidCheckpointError as error:
                self._set_aside(name, str(error))
                return self._home.begin(name)
            raise

    def _tried(self, draft: str, staging: Future[Tensor]) -> dict[str, Any]:
        """Return the file that this rank wrote, or the reason why it could not, as JSON."""
        try:
            self._fence()
            return {"file": self._create(draft, f"rank-{self._world.rank:05d}.bin", bytes_of(staging.result()))}
        except Exception as error:
            return {"fault": str(error)}

    def _create(self, draft: str, file: str, content: memoryview) -> tuple[str, int, tuple[str, ...]]:
        return file, len(content), write_file(self._home, draft + file, content)

    def _commit(
        self, name: str, draft: str, of_ranks: Sequence[tuple[str, int, Sequence[str]]], state: dict[str, Any]
    ) -> None:
        layout = self._create(draft, LAYOUT, memoryview(self._layout))
        *files, layout_file = (
            StoredFile(self._home.stored_name(name, draft, file), length, tuple(digests))
            for file, length, digests in (*of_ranks, layout)
        )
        marker = encode_metadata(files, layout_file, state)
        self._fence()
        self._home.commit(name, draft, marker)

    def load(
        self,
        fragments_of: Callable[[Metadata], Sequence[Fragment]],
        *,
        set_aside: bool = False,
        progress: Progress = ignore,
    ) -> Metadata | None:
        """Fill fragments from the newest checkpoint that is valid on all ranks.

        No value of any rank changes before every rank has verified what it needs. If one rank finds the checkpoint
        invalid, all ranks try the one before.

        Args:
            fragments_of: returns the fragments to fill from a checkpoint. Called again for an earlier checkpoint.
            set_aside: whether to quarantine invalid checkpoints; only the run's own processes may.
            progress: called with bytes read and bytes in all, of this rank.

        Returns:
            The metadata of the checkpoint; None if there is no checkpoint.

        Raises:
            CheckpointError: no checkpoint is valid, or one cannot be read or does not fit the fragments; on all ranks.
        """

        def attempt(name: str) -> tuple[Metadata, Sequence[Fragment], Tensor]:
            metadata = metadata_in(self._home, name)
            fragments = fragments_of(metadata)
            values = self._buffer(fragments)
            read_verified(metadata, fragments, values, progress)
            return metadata, fragments, values

        found = self._newest(attempt, set_aside=set_aside)
        if found is None:
            return None
        metadata, fragments, values = found
        fill(fragments, values)
        return metadata

    def newest_valid(self, progress: Progress = ignore) -> Metadata | None:
        """Return the newest checkpoint whose bytes are intact. Each rank verifies a part of it, and all agree.

        Args:
            progress: called with bytes verified and bytes in all, of this rank's part.

        Raises:
            CheckpointError: there are checkpoints and none is valid, or one cannot be read.
        """
        return self._newest(lambda name: self._verified(name, progress), set_aside=False)

    def _verified(self, name: str, progress: Progress = ignore) -> Metadata:
        metadata = metadata_in(self._home, name)
        verify_data(metadata, self._world.rank, self._world.size, progress)
        return metadata

    def _newest(self, attempt: Callable[[str], T], *, set_aside: bool) -> T | None:
        """Return the result of an attempt for the newest checkpoint valid on all ranks; None if there is no checkpoint.

        Raises:
            CheckpointError: no checkpoint is valid.
        """
        for name in reversed(self._world.on_first(self._names)):
            if (found := self._found_by_all(name, attempt, set_aside=set_aside)) is not None:
                return found
        if self._world.on_first(lambda: bool(self._names()) or self._home.has_set_aside()):
            what_next = (
                "restore one from a copy, or remove that folder to train from the beginning"
                if set_aside
                else "name another checkpoint, or an export"
            )
            raise CheckpointError(f"no checkpoint in {self.folder} is valid; {what_next}")
        return None

    def _found_by_all(self, name: str, attempt: Callable[[str], T], *, set_aside: bool) -> T | None:
        """Return the result of an attempt to read a checkpoint; None on all ranks if one finds it invalid.

        Raises:
            Exception: this rank could not read or use it; the other ranks raise a CheckpointError that says so.
        """
        found, invalid, fault = None, None, None
        try:
            found = attempt(name)
        except InvalidCheckpointError as error:
            invalid = str(error)
        except Exception as error:
            fault = error
        told = self._world.gather([invalid, None if fault is None else str(fault)])
        if fault is not None:
            raise fault
        if faults := [text for _, text in told if text is not None]:
            raise CheckpointError(faults[0])
        reasons = [text for text, _ in told if text is not None]
        if not reasons:
            return found
        log.warning("checkpoint %s is not valid: %s", name, reasons[0])
        if set_aside:
            self._world.on_first(lambda: self._set_aside(name, reasons[0]))
        return None

    def _set_aside(self, name: str, reason: str) -> None:
        self._fence()
        log.warning("the checkpoint was moved to %s", self._home.set_aside(name, reason))

    def prune(self) -> list[Location]:
        """Delete the checkpoints that are not kept, and return them. All ranks call this.

        A checkpoint that this start has not written is verified before it counts as one of the newest.
        """
        names = self._world.on_first(self._names)
        if self._keep is None:
            return []
        kept = 0
        while len(names) + kept > self._keep and kept < self._keep:
            kept += self._is_valid(names.pop())
        old = [name for name in names if kept == self._keep and not self._is_kept_for_ever(name)]
        self._world.on_first(lambda: self._delete(old))
        return [self.folder / name for name in old]

    def _is_valid(self, name: str) -> bool:
        if name not in self._found_valid and self._found_by_all(name, self._verified, set_aside=True) is not None:
            self._found_valid.add(name)
        return name in self._found_valid

    def _is_kept_for_ever(self, name: str) -> bool:
        return self._keep_every is not None and step_in(name) % self._keep_every == 0

    def _delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._fence()
            self._home.delete(name)

    def sweep(self) -> None:
        """Remove what a killed process was writing or deleting. Only the run's own process calls this, before it loads.

        An older start of the run cannot commit its unfinished checkpoint afterwards.

        Raises:
            CheckpointError: the home cannot be read or written.
        """
        try:
            self._home.sweep()
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be cleaned up: {error}") from error

    def committed(self) -> list[Location]:
        """Return all committed checkpoints, oldest first, without verifying them."""
        return committed(self._home)

    def _names(self) -> list[str]:
        return [checkpoint.name for checkpoint in self.committed()]
