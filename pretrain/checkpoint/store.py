"""Checkpoints of a run: save during training, commit, load the newest valid one, quarantine invalid ones, keep some.

    fragments ─▶ staging ─▶ rank-00000.bin, rank-00001.bin, … ─▶ layout.json ─▶ metadata.json
      live       a copy       each rank its own, durable            the first rank: commit

    newest checkpoint ─▶ staging ─▶ all ranks found it valid ─▶ fragments
      or the one before  digests      or they try the one before

Valid means: the bytes are intact, the checkpoint is what its place says (identity.py), and its numbers are finite
(values.py). A save whose numbers are not finite is written apart, as a post-mortem that no start reads.

The loop continues at once. Its next passes change no copied value, and its next update waits for the copy. A thread of
each rank does the rest; these threads have a process group of their own.
"""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

from byteloom.core.progress import Progress, ignore
from byteloom.core.storage.locations import Location
from byteloom.core.storage.step_folders import POST_MORTEM, step_in, step_name
from pretrain.checkpoint.data import (
    bytes_of,
    metadata_from,
    metadata_in,
    metadata_texts,
    state_in,
    verify_data,
    write_file,
)
from pretrain.checkpoint.errors import CheckpointError, InvalidCheckpointError, NotFiniteError
from pretrain.checkpoint.format import (
    LAYOUT,
    Metadata,
    StoredFile,
    encode_layout,
    encode_metadata,
    owned_ranges,
)
from pretrain.checkpoint.homes.home import committed, open_home
from pretrain.checkpoint.identity import fault_in_course
from pretrain.checkpoint.loading import Share
from pretrain.checkpoint.staging import Staging, is_on_gpu, pieces_of, places_of
from pretrain.checkpoint.values import (
    Staged,
    copy_and_look,
    count_not_finite,
    describe_since,
    merged_counts,
    refuse_not_finite,
)
from pretrain.distributed.fragments import Fragment
from pretrain.distributed.world import ALONE, World, WorldError

log = logging.getLogger(__name__)

T = TypeVar("T")


class CheckpointStore:
    """Checkpoints of one run, named by their step. All ranks call the same methods.

    Args:
        home: a folder or URL.
        keep: as in `CheckpointConfig`.
        world: the ranks of the run.
        keep_every: as in `CheckpointConfig`.
        fence: called before anything is written; raises if this process may no longer write.
        run: id of the run; a checkpoint of another one is not valid here. None accepts all.

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
        run: str | None = None,
    ) -> None:
        self._home = open_home(home)
        self._keep, self._keep_every = keep, keep_every
        self._world = world.with_own_group()
        self._fence, self._run = fence, run
        self._memory = Staging()
        self._stager = ThreadPoolExecutor(1, "stager", initializer=world.use_device)
        self._staging: Future[Staged] | None = None
        """Copy of the save in progress."""
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None
        self._owned = b""
        """Ranges of this rank in the layout."""
        self._layout = b""
        """Layout of the ranges that ranks own; on the first rank."""
        self._found_valid: set[str] = set()
        """Names of the checkpoints that this start wrote or verified."""
        self.also_keep: Callable[[Sequence[int]], Sequence[int]] = lambda steps: ()
        """Chooses the steps whose checkpoints stay besides the newest ones; the same on all ranks."""
        self.finite_step = 0
        """Newest step after which all values were found finite. The first values of a run count as finite."""
        self.not_finite = ""
        """Tensors in which the last save found non-finite values; empty if there are none. Equal after `finish`."""

    @property
    def folder(self) -> Location:
        """Home of the checkpoints."""
        return self._home.location

    def path(self, step: int) -> Location:
        """Return the place of the checkpoint of a step."""
        return self.folder / step_name(step)

    def save(self, step: int, fragments: Sequence[Fragment], state: dict[str, Any]) -> Location:
        """Write a checkpoint, then delete the oldest. It is whole and on disk when this returns.

        Values that are not finite are written as a post-mortem instead, which replaces one of the same step.

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

    def begin(
        self, step: int, fragments: Sequence[Fragment], state: dict[str, Any], *, is_post_mortem: bool = False
    ) -> None:
        """Start a save, and return at once. Fragments must not change until `wait_for_copy` has returned.

        Waits for the end of the previous save first. The arguments are those of `save`; `is_post_mortem` writes it
        apart even if all values are finite.

        Raises:
            CheckpointError: the previous save failed; this one was not started.
        """
        self.finish()
        self._staging = self._stager.submit(self._stage, fragments)
        arguments = (step, self._staging, owned_ranges(fragments), state, is_post_mortem)
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

    def check_finite(self) -> None:
        """Check what the last save found. Ranks learn it at different times.

        Raises:
            NotFiniteError: values are NaN or infinite.
        """
        if self.not_finite:
            raise NotFiniteError(self.not_finite)

    def describe_values(self, step: int, fragments: Sequence[Fragment]) -> str:
        """Return a clause: the values are finite, or since which step they are not. All ranks call it.

        Waits for the end of the save in progress.

        Args:
            step: after which this is.
            fragments: that this rank owns.
        """
        if self._thread is not None:
            self._thread.join()
        found = merged_counts(self._world.gather(count_not_finite(fragments)))
        if found:
            return describe_since(found, step, self.finite_step)
        return f"weights and moments after step {step} are finite"

    def _stage(self, fragments: Sequence[Fragment]) -> Staged:
        """Copy the values into reused memory, one fragment after another; return it, and what is not finite."""
        chunks = self._memory.chunks(sum(len(fragment.data) for fragment in fragments), pinned=is_on_gpu(fragments))
        pieces = pieces_of(fragments)
        places = places_of(pieces, chunks)
        suspects = copy_and_look(places, [piece.data for piece in pieces])
        copies = [Fragment(p.name, p.shape, p.start, places[i]) for i, p in ((i, pieces[i]) for i in suspects)]
        return Staged(chunks, count_not_finite(copies))

    def _write_behind(
        self, step: int, staging: Future[Staged], owned: bytes, state: dict[str, Any], is_post_mortem: bool
    ) -> None:
        try:
            not_finite = self._plan(owned, staging)
            if not_finite:
                self.not_finite = describe_since(not_finite, step, self.finite_step)
            name = step_name(step) + (POST_MORTEM if not_finite or is_post_mortem else "")
            self._write(name, staging, state, not_finite)
        except Exception as error:  # logged at once, and raised by `finish`
            self._fault = error
            log.error("cannot write the checkpoint of step %d: %s", step, error)
            return
        if name.endswith(POST_MORTEM):
            log.warning(
                "post-mortem %s: %s. No start resumes from it",
                self.folder / name,
                self.not_finite or "the run diverged after this step",
            )
            return
        log.info("checkpoint %s", self.folder / name)
        self._found_valid.add(name)
        self.finite_step = step
        try:
            self.prune()
        except Exception as error:
            log.warning("cannot delete old checkpoints: %s", error)

    def _write(self, name: str, staging: Future[Staged], state: dict[str, Any], not_finite: Mapping[str, int]) -> None:
        world = self._world
        draft = world.on_first(lambda: self._begin(name))
        try:
            of_ranks = world.gather_on_first(json.dumps(self._tried(draft, staging)).encode())
            if fault := world.on_first(lambda: self._commit(name, draft, of_ranks, state, not_finite)):
                raise WorldError(fault)
        except Exception:
            if world.is_first:
                with contextlib.suppress(OSError):
                    self._home.abandon(draft)
            raise

    def _plan(self, owned: bytes, staging: Future[Staged]) -> dict[str, int]:
        """Send the ranges that each rank owns to the first rank, if they changed since the last save.

        Return what is not finite on any rank.
        """
        world = self._world
        own = {} if staging.exception() else staging.result().not_finite  # `_tried` tells the exception
        changes, found = world.sum(owned != self._owned, len(own))
        if changes:
            of_ranks = world.gather_on_first(owned)
            world.on_first(lambda: self._keep_layout(of_ranks))
            self._owned = owned
        return merged_counts(world.gather(own)) if found else {}

    def _keep_layout(self, of_ranks: Sequence[bytes]) -> None:
        self._layout = encode_layout(of_ranks)

    @contextlib.contextmanager
    def _fenced(self) -> Iterator[None]:
        """Check the fence, and again if writing fails, because the fence reports a run folder that is gone."""
        self._fence()
        try:
            yield
        except OSError:
            self._fence()
            raise

    def _begin(self, name: str) -> str:
        with self._fenced():
            try:
                return self._home.begin(name)
            except FileExistsError:
                if name.endswith(POST_MORTEM):
                    self._home.delete(name)
                else:
                    self.set_aside(name, self._why_not_of_this_start(name))
                return self._home.begin(name)

    def _why_not_of_this_start(self, name: str) -> str:
        """Return the reason against a checkpoint that was put where this start is about to write one."""
        try:
            verify_data(metadata_in(self._home, name))
        except InvalidCheckpointError as error:  # at a URL also: a marker of a fenced start, without its files
            return str(error)
        return "the run has reached this step again, from an earlier checkpoint, and has written its own"

    def _tried(self, draft: str, staging: Future[Staged]) -> dict[str, Any]:
        """Return the file that this rank wrote, or the reason why it could not, as JSON."""
        try:
            chunks = [bytes_of(chunk) for chunk in staging.result().chunks]
            with self._fenced():
                return {"file": self._create(draft, f"rank-{self._world.rank:05d}.bin", *chunks)}
        except Exception as error:
            return {"fault": str(error)}

    def _create(self, draft: str, file: str, *chunks: memoryview) -> tuple[str, int, tuple[str, ...]]:
        return file, sum(map(len, chunks)), write_file(self._home, draft + file, *chunks)

    def _commit(
        self, name: str, draft: str, of_ranks: Sequence[bytes], state: dict[str, Any], not_finite: Mapping[str, int]
    ) -> str | None:
        """Commit what all ranks have written; return the reason if one of them could not write its file."""
        told = [json.loads(content) for content in of_ranks]
        if faults := [f"rank {rank}: {answer['fault']}" for rank, answer in enumerate(told) if "fault" in answer]:
            return faults[0]
        with self._fenced():
            layout = self._create(draft, LAYOUT, memoryview(self._layout))
        *files, layout_file = (
            StoredFile(self._home.stored_name(name, draft, file), length, tuple(digests))
            for file, length, digests in (*(answer["file"] for answer in told), layout)
        )
        marker = encode_metadata(files, layout_file, state, not_finite)
        with self._fenced():
            self._home.commit(name, draft, marker)
        return None

    def load(
        self,
        fragments_of: Callable[[Metadata], Sequence[Fragment]],
        *,
        set_aside: bool = False,
        progress: Progress = ignore,
    ) -> Metadata | None:
        """Fill fragments from the newest checkpoint that is valid on all ranks. All ranks together read it once.

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

        def attempt(metadata: Metadata) -> tuple[Metadata, Share]:
            share = Share(metadata, fragments_of(metadata), self._world, self._memory, progress)
            refuse_not_finite(metadata.folder, share.not_finite)
            return metadata, share

        if (found := self._newest(attempt, set_aside=set_aside)) is None:
            return None
        metadata, share = found
        share.fill()
        self.finite_step = step_in(metadata.name)
        return metadata

    def newest_valid(self, progress: Progress = ignore) -> Metadata | None:
        """Return the newest valid checkpoint. Each rank verifies a part of it, and all agree.

        Args:
            progress: called with bytes verified and bytes in all, of this rank's part.

        Raises:
            CheckpointError: there are checkpoints and none is valid, or one cannot be read.
        """
        return self._newest(lambda metadata: self._verified(metadata, progress), set_aside=False)

    def _verified(self, metadata: Metadata, progress: Progress = ignore) -> Metadata:
        found = verify_data(metadata, self._world.rank, self._world.size, progress)
        refuse_not_finite(found.folder, found.not_finite or {})
        return found

    def _newest(self, attempt: Callable[[Metadata], T], *, set_aside: bool) -> T | None:
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

    def _found_by_all(self, name: str, attempt: Callable[[Metadata], T], *, set_aside: bool) -> T | None:
        """Return the result of an attempt to read a checkpoint; None on all ranks if one finds it invalid.

        Raises:
            Exception: this rank could not read or use it; the other ranks raise an error that says so.
        """
        found, fault = None, None
        invalid, texts = self._world.on_first(lambda: self._fault_or_texts(name))
        try:
            found = None if texts is None else attempt(metadata_from(self._home, name, *texts))
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
            self._world.on_first(lambda: self.set_aside(name, reasons[0]))
        return None

    def _fault_or_texts(self, name: str) -> tuple[str | None, tuple[str, str] | None]:
        """Return the reason why a checkpoint is invalid, or else the texts of its metadata, read by the first rank."""
        if fault := self._fault_of_identity(name):
            return fault, None
        try:
            return None, metadata_texts(self._home, name)
        except InvalidCheckpointError as error:
            return str(error), None

    def _fault_of_identity(self, name: str) -> str | None:
        """Return why a checkpoint does not continue the run's history; None if it does, or if it is unreadable."""
        fault = fault_in_course(name, self._names(), partial(state_in, self._home), self._run)
        return None if fault is None else f"{self.folder / name} {fault}"

    def states(self) -> Iterator[dict[str, Any]]:
        """Yield the states of the checkpoints whose metadata is valid, newest first."""
        for name in reversed(self._names()):
            if (state := state_in(self._home, name)) is not None:
                yield state

    def set_aside(self, name: str, reason: str) -> None:
        """Quarantine a checkpoint. Only the first rank calls this."""
        with self._fenced():
            log.warning("the checkpoint was moved to %s", self._home.set_aside(name, reason))

    def prune(self) -> list[Location]:
        """Delete the checkpoints that are not kept, and return them. All ranks call this.

        A checkpoint that this start has not written is verified before it counts as one of the newest.
        """
        names = self._world.on_first(self._names)
        if self._keep is None:
            return []
        also, kept = self.also_keep([step_in(name) for name in names]), 0
        while len(names) + kept > self._keep and kept < self._keep:
            kept += self._is_valid(names.pop())
        old = [name for name in names if kept == self._keep and not self._is_kept(name, also)]
        self._world.on_first(lambda: self._delete(old))
        return [self.folder / name for name in old]

    def _is_valid(self, name: str) -> bool:
        if name not in self._found_valid and self._found_by_all(name, self._verified, set_aside=True) is not None:
            self._found_valid.add(name)
        return name in self._found_valid

    def _is_kept(self, name: str, also: Sequence[int]) -> bool:
        return step_in(name) in also or (self._keep_every is not None and step_in(name) % self._keep_every == 0)

    def _delete(self, names: Sequence[str]) -> None:
        for name in names:
            if fault := self._fault_of_identity(name):
                self.set_aside(name, fault)
                continue
            with self._fenced():
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
