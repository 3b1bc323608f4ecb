"""A run's checkpoints: save behind training, commit, load the newest valid one, set invalid ones aside, keep some.

    fragments ─▶ staging buffer ─▶ rank-00000.bin, rank-00001.bin, … ─▶ layout.json ─▶ metadata.json
      live         a copy             each rank its own, durable            the first rank: commit

    newest checkpoint ─▶ staging buffer ─▶ all ranks found it valid ─▶ fragments
      or the one before      digests          or they go on with the one before

The loop goes on at once. Its next passes change nothing of what is copied, and its next update waits for the copy. What
follows is done by a thread of each rank, and the threads talk by a process group of their own.
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
    """The newest checkpoints that are kept, all of them found valid; older ones are deleted after a new one is on disk.
    Null keeps all for ever."""
    keep_every: int | None = Field(default=None, ge=1)
    """Beside those, checkpoints of steps that are multiples of this are kept for ever."""
    asynchronous: bool = True
    """Write behind training. It takes a copy of what a rank owns of masters and moments in the host's memory."""
    home: LocationText | None = None
    """Folder or URL (s3://bucket/folder, for one) in which each run has a folder of checkpoints, by its name, and finds
    them even from a new run folder. Null is the run folder itself."""


class CheckpointStore:
    """The checkpoints of one run, named by their step. All ranks of a run have one, and call it alike.

    Args:
        home: a folder or URL.
        keep, keep_every: as of CheckpointConfig.
        fence: called before anything is written; raises if this process may not write any more.
    Raises:
        CheckpointError: there cannot be a home.
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
        """The copy of the save under way."""
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None
        self._owned: Owned | None = None
        self._layout = b""
        """Of the ranges that ranks told last; on the first rank."""
        self._found_valid: set[str] = set()
        """Names of those that this start wrote or verified."""

    @property
    def folder(self) -> Location:
        """The home."""
        return self._home.location

    def path(self, step: int) -> Location:
        return self.folder / step_name(step)

    def save(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> Location:
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
        """As `save`, but returns at once; fragments must stay as they are until `wait_for_copy` has returned.

        Waits for the save before to end first.

        Raises:
            CheckpointError: the save before failed; this one has not begun.
        """
        self.finish()
        self._staging = self._stager.submit(self._stage, fragments)
        arguments = (self.path(step).name, self._staging, owned_ranges(fragments), state)
        self._thread = threading.Thread(target=self._write_behind, args=arguments, daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Returns when the fragments of the save under way may change, if there is one."""
        if self._staging is not None:
            wait([self._staging])

    def finish(self) -> None:
        """Waits for the save under way, if there is one.

        Raises:
            CheckpointError: it failed.
        """
        if self._thread is None:
            return
        self._thread.join()
        fault, self._thread, self._fault, self._staging = self._fault, None, None, None
        if fault is not None:
            raise CheckpointError(f"cannot write a checkpoint: {fault}") from fault

    def _stage(self, fragments: Sequence[Fragment]) -> Tensor:
        """The values as they are now, one fragment after another, in a buffer that is used again."""
        values = self._buffer(fragments)
        lengths = [len(fragment.data) for fragment in fragments]
        copy(values.split(lengths), [fragment.data for fragment in fragments])
        return values

    def _buffer(self, fragments: Sequence[Fragment]) -> Tensor:
        length = sum(len(fragment.data) for fragment in fragments)
        if len(self._staged) != length:
            self._staged = torch.empty(0)  # first one goes, then the other comes
            on_cuda = any(fragment.data.is_cuda for fragment in fragments)
            self._staged = torch.empty(length, pin_memory=True) if on_cuda else host_buffer(length)
        return self._staged

    def _write_behind(self, name: str, staging: Future[Tensor], owned: Owned, state: dict[str, Any]) -> None:
        try:
            self._write(name, staging, owned, state)
            log.info("checkpoint %s", self.folder / name)
        except Exception as error:  # told at once, and raised by `finish`
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
        """Tells the first rank who writes what, where that is not as it was at the save before."""
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
        except FileExistsError:  # at a URL, the marker of a start that was fenced off, if nothing is left to mark
            try:
                verify_data(metadata_in(self._home, name))
            except InvalidCheckpointError as error:
                self._set_aside(name, str(error))
                return self._home.begin(name)
            raise

    def _tried(self, draft: str, staging: Future[Tensor]) -> dict[str, Any]:
        """The file that this rank wrote, or why it could not, as JSON."""
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
        """Fills fragments from the newest checkpoint in which all that any rank needs is as it was written.

        No value of any rank changes before all ranks have found theirs. Where one has not, all go on with the
        checkpoint before.

        Args:
            fragments_of: what to fill from a checkpoint. Called again for the one before, if one is not valid.
            set_aside: whether invalid ones on the way are none any more, which is for the run's own processes to do.
            progress: called with bytes read and bytes in all, of what this rank needs.
        Returns:
            None where there is no checkpoint.
        Raises:
            CheckpointError: there are checkpoints and none is valid, or one cannot be read or is not what fragments
                are of; on all ranks.
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
        """The newest checkpoint of which every byte is as written. Each rank looks at a part of it, and all agree.

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
        """What an attempt gives for the newest checkpoint that all ranks find valid; None if there is no checkpoint.

        Raises:
            CheckpointError: there are some, and none is valid.
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
        """What an attempt to read a checkpoint gives on each rank; None on all where one has found it invalid.

        Raises:
            Exception: it could not be read, or not be used; on ranks where it could, a CheckpointError that says so.
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
        """Deletes the checkpoints that need not be kept; returns those that were. All ranks call it.

        Those that this start has not written are verified before they count among the newest that stay.
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
        """Removes what a killed process was writing or deleting. For the run's own process, before it loads or saves.

        What an older start of the run was about to commit, it cannot commit after this.

        Raises:
            CheckpointError: the home cannot be read or written.
        """
        try:
            self._home.sweep()
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be cleaned up: {error}") from error

    def committed(self) -> list[Location]:
        """The checkpoints there are, oldest first; their content has not been verified."""
        return committed(self._home)

    def _names(self) -> list[str]:
        return [checkpoint.name for checkpoint in self.committed()]
