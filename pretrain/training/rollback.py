"""Rollback of a run to an earlier checkpoint: later ones are set aside, and the next start resumes from it."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from byteloom.core.progress import Progress, ignore
from byteloom.core.storage.step_folders import step_in
from launchers.slurm.scheduler import JobPhase
from pretrain.checkpoint import CheckpointError, Metadata
from pretrain.checkpoint.copies import checkpoint_of_step
from pretrain.checkpoint.data import state_in, verify_data
from pretrain.checkpoint.homes.fence import starts_noted_at
from pretrain.checkpoint.homes.home import Home
from pretrain.checkpoint.values import refuse_not_finite
from pretrain.tracking import Journal
from pretrain.tracking.journal import lines
from pretrain.training.home_owner import fence_of, owner_of
from pretrain.training.run_folder import Rollback, RunFolder, RunFolderError, rollback_before
from pretrain.training.run_status import check_run, status_of


def roll_back(run: Path, step: int, reason: str, progress: Progress = ignore) -> Rollback:
    """Set aside the checkpoints of a run after a step, so that the next start resumes from the step.

    The rollback takes a generation of the run's fence. A process that was cut off can therefore save no later step.
    An interrupted rollback is completed by a second one.

    Args:
        run: run folder.
        step: step of a valid checkpoint.
        reason: text for run.json, for trackers, and for the checkpoints that are set aside.
        progress: called with bytes verified and bytes in all.

    Raises:
        RunFolderError: the folder is not a run, or a process trains it.
        CheckpointError: the reason is empty, there is no valid checkpoint of the step, or nothing after it.
        FencedError: the rollback cannot be noted.
    """
    check_run(run)
    if not reason.strip():
        raise CheckpointError("the reason of a rollback is empty; say in --reason why the later steps are left")
    _refuse_living(run)
    folder = RunFolder(run)
    with folder.locked():
        identity = folder.stored_identity()
        if identity is None:
            raise RunFolderError(f"{run} has not started yet, so there is nothing to roll back")
        metadata = _target(folder, step, identity["id"], progress)
        try:
            rollback = _begin(folder, identity, metadata, reason)
            for name in reversed(_later(metadata.home, step)):  # an interrupted rollback leaves a valid course
                metadata.home.set_aside(name, str(rollback))
            _shorten_journal(folder.metrics, step)
        except OSError as error:
            raise CheckpointError(f"the rollback is not complete: {error}; the same command completes it") from error
    return rollback


def _refuse_living(run: Path) -> None:
    """Raise RunFolderError if a process trains a run, or may do so where this machine cannot see it."""
    status = status_of(run)
    if status.state in {phase for phase in JobPhase if phase.is_alive}:
        raise RunFolderError(f"{run} is {status.state}; stop it first: byteloom cancel {run}")
    if status.state == JobPhase.UNKNOWN:
        raise RunFolderError(f"{run} may be running: {status.reason}; stop it first")


def _target(folder: RunFolder, step: int, run: str, progress: Progress) -> Metadata:
    """Return the checkpoint to which a run returns, verified.

    Raises:
        CheckpointError: it does not exist, is not valid, or the home belongs to another run.
    """
    place = folder.checkpoints
    if (owner := owner_of(place)) not in (None, run):
        raise CheckpointError(f"{place} belongs to run {owner}, and {folder.path} is run {run}")
    metadata = checkpoint_of_step(place, step, run)
    refuse_not_finite(metadata.folder, verify_data(metadata, progress=progress).not_finite or {})
    return metadata


def _begin(folder: RunFolder, identity: Mapping[str, Any], metadata: Metadata, reason: str) -> Rollback:
    """Take a generation, and write the rollback to run.json; return it. An interrupted rollback keeps its generation.

    Raises:
        CheckpointError: there is no checkpoint after the step.
    """
    step = metadata.state["reading"]["step"]
    later, earlier = _later(metadata.home, step), list(identity.get("rollbacks", ()))
    before = rollback_before(identity, 1 + starts_noted_at(folder.generation))
    if not later and (before is None or before.to_step != step):
        raise CheckpointError(f"{metadata.folder} is the newest checkpoint already; there is nothing to set aside")
    newest = step_in(later[-1]) if later else step
    if before is None:
        generation = _take_generation(folder, metadata.home)
    else:
        earlier.pop()
        newest, generation = max(newest, before.from_step), before.generation
    rollback = Rollback(to_step=step, from_step=newest, reason=reason, time=time.time(), generation=generation)
    folder.write_identity({**identity, "rollbacks": [*earlier, rollback.model_dump()]})
    return rollback


def _take_generation(folder: RunFolder, home: Home) -> int:
    """Take the next generation of a run, so that its older processes write no more; return it."""
    fence = fence_of(folder, folder.home)
    states = [state_in(home, name) for name in home.names()]
    fence.claim(after=max((state.get("generation", 0) for state in states if state), default=0))
    return starts_noted_at(folder.generation)


def _later(home: Home, step: int) -> list[str]:
    """Return the names of the checkpoints after a step, oldest first."""
    return [name for name in home.names() if step_in(name) > step]


def _shorten_journal(metrics: Path, step: int) -> None:
    """Drop the lines of a journal after a step; a copy keeps them."""
    last = max((line.record["step"] for line in lines(metrics, report=lambda fault: None)), default=0)
    if last > step:
        shutil.copyfile(metrics, metrics.with_name(f"{metrics.name}.until-{last}"))
        Journal(metrics, step).close()
