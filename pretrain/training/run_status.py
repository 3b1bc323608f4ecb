"""Status of a run, read from its folder and asked of the scheduler each time.

config.yaml, metrics.jsonl, checkpoints/, generation, launches.jsonl ─┐
holder of the folder's lock ──────────────────────────────────────────┼─▶ RunStatus
the scheduler's answer about the newest job ──────────────────────────┘
"""

import os
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from byteloom.core.provenance import read_source
from byteloom.core.storage.state_files import StateFileError, read_yaml
from byteloom.core.storage.step_folders import step_of
from launchers.slurm import scheduler
from launchers.slurm.scheduler import Job, JobPhase, SchedulerError
from launchers.supervision.machine import is_elsewhere, is_running
from launchers.supervision.record import Launch, LaunchRecord, last_submission
from launchers.supervision.slow_ranks import read_slow_ranks
from pretrain.checkpoint import CheckpointError, Location, locate
from pretrain.checkpoint.homes.fence import starts_noted_at
from pretrain.checkpoint.homes.home import committed, open_home
from pretrain.terminal.losses import BITS_PER_BYTE, loss_at
from pretrain.terminal.patches import stages_of
from pretrain.tracking.journal import lines, read_journal
from pretrain.training.ancestry import ANCESTRY
from pretrain.training.run_folder import RunFolder, RunFolderError, read_recipe

T = TypeVar("T")

RECENT_STEPS = 20
"""Steps over which the mean speed is computed."""
TAIL_BYTES = 64 << 10
"""Bytes at the end of the journal that are read; they hold more than RECENT_STEPS steps."""
ANSWER_SECONDS = 10.0
"""Seconds that the server of a home of checkpoints may take to answer."""
NUMBERS_OF_A_STEP = {"step_seconds", "bytes_per_second"}
"""Metrics that each line of a step has, besides the loss."""
DAMAGED = "damaged"
"""State of a run that no process trains and that has a damaged file."""
ENDINGS = ("stopped", "failed", "requeued", "excluded", "gave_up")
"""Events of the record that explain why ranks do not run, or run again."""


@dataclass(frozen=True)
class RunStatus:
    """Status of one run at one moment. Unknown values are None."""

    run: str
    """Path of the run folder."""
    recipe: str | None
    """Recipe of the last start: the name of one that comes with Byteloom, or the path of a file."""
    state: str
    """State of the job while there is one; else running, stopped, finished, failed or damaged."""
    reason: str
    """Reason that the scheduler gives for the state."""
    job: str | None
    """Id of the newest job; None for a run without a scheduler."""
    process: int | None
    """Id of the process of this machine that trains the run, or that supervises it in the background. SIGTERM makes
    the run save and stop."""
    nodes: str
    """Nodes on which the run is trained."""
    step: int
    """Last step whose numbers are written. A new start resumes from the last checkpoint."""
    steps: int | None
    """Steps of the whole run."""
    bits_per_byte: float | None
    """Training loss of the last step; None for an objective with another loss."""
    validation_bits_per_byte: float | None
    """Newest validation loss; None for an objective with another loss."""
    bytes_per_second: float | None
    """Mean speed over the last steps; None while no process trains the run."""
    seconds_left: float | None
    """Expected time to the last step; None while no process trains the run."""
    checkpoint_step: int | None
    """Step of the newest checkpoint."""
    checkpoint_seconds: float | None
    """Seconds since the newest checkpoint was written."""
    starts: int
    """Starts that a person requested, by `train` or `submit`."""
    restarts: int
    """Starts by the supervisor or the scheduler, within a job."""
    why: str
    """Reason of the newest restart or ending."""
    history: list[dict[str, Any]]
    """Lines of launches.jsonl."""
    ancestry: list[dict[str, Any]]
    """Fields of each Ancestor of the run, oldest first."""
    rollbacks: list[dict[str, Any]]
    """Fields of each Rollback of the run, oldest first."""
    coverage: dict[str, dict[str, Any]]
    """Coverage of each source by an epoch: the fields of Coverage, its share of the bytes, and a
    sentence."""
    slow_ranks: list[dict[str, Any]]
    """Fields of each SlowRank of the last window of steps; empty while no process trains the run."""
    problems: list[str]
    """Files that are damaged or cannot be read, a line each."""
    metric: str = BITS_PER_BYTE
    """Name of the loss, which the objective decides."""
    loss: float | None = None
    """Training loss of the last step, in `metric`."""
    validation_loss: float | None = None
    """Newest validation loss, in `metric`."""
    mfu: float | None = None
    """Model FLOPs utilization of the last step; None while no process trains the run, or on an unknown device."""
    data_wait_share: float | None = None
    """Share of the last steps that waited for data; None while no process trains the run."""
    ranks: int | None = None
    """Ranks of the last step."""
    patches: dict[str, dict[str, float]] = field(default_factory=dict)
    """Mean metrics of patches over the last steps, by stage and name; empty if patches do not follow the data."""


def find_runs(paths: Sequence[Path], report: Callable[[str], None] = lambda skipped: None) -> list[Path]:
    """Return the runs at paths. Each path is a run or a folder of runs.

    A pattern such as runs/* also names files and folders of other things, such as NAME.compare. They are skipped.

    Args:
        paths: as typed.
        report: called with a line about the paths that are skipped, if there are any.

    Raises:
        RunFolderError: a path does not exist, or no path has a run.
    """
    found, others = list[Path](), list[Path]()
    for path in paths:
        runs = [path] if _is_run(path) else [run for run in sorted(path.glob("*")) if _can_be_seen_as_run(run)]
        found += runs
        others += [] if runs else [path]
    if others and not (found and all(path.exists() for path in others)):
        path = next((path for path in others if not path.exists()), others[0])
        raise RunFolderError(f"{path} is not a run and not a folder of runs; a run has run.json or launches.jsonl")
    if others:
        report(f"skipped, because no run is there: {', '.join(map(str, others))}")
    return found


def status_of(path: Path) -> RunStatus:
    """Return the status of a run.

    Raises:
        RunFolderError: the folder is not a run.
    """
    check_run(path)
    folder, problems = RunFolder(path), _Problems()
    identity = problems.read(folder.stored_identity, None) or {}
    ancestry, rollbacks = identity.get(ANCESTRY, []), identity.get("rollbacks", [])
    launches = problems.read(lambda: LaunchRecord(path).read(problems.lines.append), list[Launch]())
    submission = last_submission(path)
    is_local = submission is not None and problems.read(lambda: _scheduler(submission), "") == "local"
    job = _job(launches, is_local)
    holder = problems.read(folder.holder, None)
    recent = problems.read(lambda: _recent(folder.metrics, problems.lines.append), list[dict[str, Any]]())
    step = recent[-1]["step"] if recent else ancestry[-1]["step"] if ancestry else 0
    resolved = folder.config if folder.config.exists() or submission is None else submission / "config.yaml"
    recipe = problems.read(lambda: read_recipe(resolved), None)
    steps = recipe.train.steps if recipe else None
    metric = _metric(recent)
    trained = [line for line in recent if line.keys() >= {*NUMBERS_OF_A_STEP, f"train/{metric}"}][-RECENT_STEPS:]
    loss = trained[-1][f"train/{metric}"] if trained else None
    validation_loss = problems.read(lambda: _last(f"validation/{metric}", folder.metrics), None)
    starts = problems.read(lambda: starts_noted_at(folder.generation), 0)
    newest = problems.read(lambda: _newest_checkpoint(folder), None)
    state = _state(job, launches, holder is not None, is_done=step == steps, is_damaged=problems.has_damage)
    bytes_per_second, step_seconds = _speed(trained) if state == JobPhase.RUNNING else (None, None)
    endings = [launch for launch in launches if launch.event in ENDINGS]
    process, nodes = _place(job, is_local, holder)
    started = [launch for launch in launches if launch.event == "started"]
    restarts = sum(launch.restart > 0 for launch in started)
    return RunStatus(
        run=str(path),
        recipe=read_source(resolved).get("recipe"),
        state=state,
        reason=job.reason if job is not None and state == job.phase else "",
        job=job.id if job and not is_local else None,
        process=process,
        nodes=nodes,
        step=step,
        steps=steps,
        bits_per_byte=loss if metric == BITS_PER_BYTE else None,
        validation_bits_per_byte=validation_loss if metric == BITS_PER_BYTE else None,
        bytes_per_second=bytes_per_second,
        mfu=None if step_seconds is None else trained[-1].get("mfu"),
        data_wait_share=None if step_seconds is None else _data_wait(trained),
        ranks=_ranks(trained[-1]) if trained else None,
        patches=stages_of(trained),
        seconds_left=None if step_seconds is None or steps is None else step_seconds * (steps - step),
        checkpoint_step=step_of(newest) if newest else None,
        checkpoint_seconds=_age(newest),
        starts=max(starts - len(rollbacks), len(started)) - restarts,
        restarts=restarts,
        why=endings[-1].summary if endings else "",
        history=[asdict(launch) for launch in launches],
        ancestry=ancestry,
        rollbacks=rollbacks,
        coverage=problems.read(lambda: _coverage(folder), {}),
        slow_ranks=[asdict(rank) for rank in read_slow_ranks(path)] if state == JobPhase.RUNNING else [],
        problems=problems.lines,
        metric=metric,
        loss=loss,
        validation_loss=validation_loss,
    )


def statuses_of(paths: Sequence[Path]) -> list[RunStatus]:
    """Return the status of each run; read them at the same time, because each may wait for a server."""
    with ThreadPoolExecutor(max(1, len(paths))) as pool:
        return list(pool.map(status_of, paths))


def check_run(path: Path) -> None:
    """Raise RunFolderError if a folder is not a run."""
    if not _is_run(path):
        raise RunFolderError(f"{path} is not a run: it has no run.json and no launches.jsonl")


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("run.json", "launches.jsonl"))


def _can_be_seen_as_run(path: Path) -> bool:
    with suppress(OSError):  # a folder that others may not open
        return _is_run(path)
    return False


class _Problems:
    """Problems of a run that are found while its status is read."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.has_damage = False
        """Whether a file of the run folder is damaged."""

    def read(self, read: Callable[[], T], otherwise: T) -> T:
        """Return what a function reads; note the problem and return another value where it fails."""
        try:
            return read()
        except (StateFileError, CheckpointError, OSError) as error:
            self.has_damage |= isinstance(error, StateFileError)
            if str(error) not in self.lines:
                self.lines.append(str(error))
        return otherwise


def _newest_checkpoint(folder: RunFolder) -> Location | None:
    """Return the newest checkpoint.

    Raises:
        CheckpointError, OSError: its home cannot be read, or does not answer in time.
        StateFileError: the recipe that names the home is damaged.
    """
    place = locate(folder.checkpoints)
    if isinstance(place, Path):
        return next(reversed(committed(open_home(place))), None)
    found: Future[Location | None] = Future()

    def look() -> None:
        try:
            found.set_result(next(reversed(committed(open_home(place))), None))
        except Exception as error:  # raised again where the result is wanted
            found.set_exception(error)

    # A daemon, so that a server that never answers does not keep the command from ending.
    threading.Thread(target=look, daemon=True).start()
    try:
        return found.result(ANSWER_SECONDS)
    except TimeoutError as error:
        raise CheckpointError(f"{place} does not answer within {ANSWER_SECONDS:.0f} s") from error


def _job(launches: Sequence[Launch], is_local: bool) -> Job | None:
    """Return the newest job with the scheduler's state; None for a run that was never submitted."""
    if not launches:
        return None
    last = launches[-1]
    if is_local:
        return _in_the_background(last)
    try:
        return scheduler.job(last.job)
    except SchedulerError as error:
        return Job(last.job, JobPhase.UNKNOWN, reason=str(error))


def _in_the_background(last: Launch) -> Job:
    """Return the job of a run in the background of a machine, which is a process there."""
    if is_running(last):
        return Job(last.job, JobPhase.RUNNING, nodes=platform.node())
    if not last.ends_background and is_elsewhere(last):
        nodes = ",".join(last.nodes)
        return Job(
            last.job, JobPhase.UNKNOWN, reason=f"process {last.job} of {nodes} cannot be seen from here", nodes=nodes
        )
    return Job(last.job, JobPhase.FORGOTTEN)


def _place(job: Job | None, is_local: bool, holder: tuple[str, int] | None) -> tuple[int | None, str]:
    """Return the process of this machine that SIGTERM may stop, if there is one, and the nodes of the run."""
    if job is not None and (job.phase.is_alive or holder is None):
        return int(job.id) if is_local and job.phase is JobPhase.RUNNING else None, job.nodes
    if holder is None:
        return None, ""
    host, process = holder
    return process if host == platform.node() else None, host


def _state(job: Job | None, launches: Sequence[Launch], is_held: bool, *, is_done: bool, is_damaged: bool) -> str:
    if job is not None and job.phase.is_alive:
        return job.phase
    if is_held:
        return JobPhase.RUNNING
    if is_damaged:
        return DAMAGED
    if is_done:
        return JobPhase.FINISHED
    if job is not None and job.phase in (JobPhase.FAILED, JobPhase.CANCELLED, JobPhase.UNKNOWN):
        return job.phase
    return JobPhase.FAILED if launches and launches[-1].event in ("failed", "gave_up") else "stopped"


def _recent(journal: Path, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return the last whole lines of metrics.jsonl.

    Args:
        journal: path of metrics.jsonl.
        report: called with the fault of a damaged line.
    """
    begin = 0
    with suppress(FileNotFoundError), journal.open("rb") as file:
        if (end := file.seek(0, os.SEEK_END)) > TAIL_BYTES:
            file.seek(end - TAIL_BYTES)
            begin = end - TAIL_BYTES + len(file.readline())
    return read_journal(journal, report, begin)


def _coverage(folder: RunFolder) -> dict[str, dict[str, Any]]:
    return {
        name: each.model_dump() | {"share": each.share, "text": str(each), "leaves_out": each.leaves_out}
        for name, each in folder.read_coverage().items()
    }


def _age(checkpoint: Location | None) -> float | None:
    """Return the seconds since a checkpoint was written; None if unknown."""
    if isinstance(checkpoint, Path):
        with suppress(FileNotFoundError):  # deleted in the meantime, for a newer one
            return time.time() - checkpoint.stat().st_mtime
    return None


def _metric(recent: Sequence[Mapping[str, Any]]) -> str:
    """Return the name of a run's loss, given the last lines of its journal; that of causal if they have none."""
    found = (loss_at(place, line) for line in reversed(recent) for place in ("train", "validation"))
    return next(filter(None, found), BITS_PER_BYTE).rpartition("/")[2]


def _last(metric: str, journal: Path) -> float | None:
    """Return the newest value of a metric in metrics.jsonl, which may be far from the end; None if there is none."""
    if not journal.is_file() or not journal.stat().st_size:
        return None
    with journal.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
        found = text.rfind(f'"{metric}"'.encode(), 0, text.rfind(b"\n") + 1)
        if found < 0:
            return None
        begin = text.rfind(b"\n", 0, found) + 1
    line = next(lines(journal, begin, lambda fault: None), None)  # `_recent` reports damage
    return line.record.get(metric) if line else None


def _speed(steps: Sequence[dict[str, float]]) -> tuple[float | None, float | None]:
    """Return bytes per second and seconds per step; None without steps."""
    seconds = sum(step["step_seconds"] for step in steps)
    if seconds <= 0:
        return None, None
    return sum(step["bytes_per_second"] * step["step_seconds"] for step in steps) / seconds, seconds / len(steps)


def _data_wait(steps: Sequence[dict[str, float]]) -> float | None:
    """Return the share of the time of steps that waited for data; None if a step lacks it."""
    if any("data_wait_share" not in step for step in steps):
        return None
    seconds = sum(step["step_seconds"] for step in steps)
    return sum(step["data_wait_share"] * step["step_seconds"] for step in steps) / seconds


def _ranks(step: dict[str, float]) -> int:
    """Return the number of ranks of a step, whose speed is also in the journal per rank if there are several."""
    each = step.get("bytes_per_second/per_rank")
    return round(step["bytes_per_second"] / each) if each else 1


class _StoredCluster(BaseModel):
    """Field of a submission's cluster.yaml that names the scheduler."""

    scheduler: str


def _scheduler(submission: Path) -> str:
    cluster = read_yaml(submission / "cluster.yaml", _StoredCluster, "restore it, or submit the run again")
    return cluster.scheduler if cluster else ""
