"""How a run fares: what its folder says, and what the scheduler says of its job, both asked anew.

config.yaml, metrics.jsonl, checkpoints/, generation, launches.jsonl ─┐
who holds the folder ─────────────────────────────────────────────────┼─▶ RunStatus
the scheduler, about the job that was submitted last ─────────────────┘
"""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import yaml

from launchers import scheduler
from launchers.machine import is_elsewhere, is_running
from launchers.record import Launch, LaunchRecord, last_submission
from launchers.scheduler import Job, Phase, SchedulerError
from pretrain.checkpoint.home import committed, open_home, step_of
from pretrain.fence import starts_noted_at
from pretrain.provenance import read_source
from pretrain.run_folder import RunFolder, RunFolderError

RECENT_STEPS = 20
"""Speed is the mean over so many."""
TAIL_BYTES = 64 << 10
"""Of the journal: more than so many steps."""
VALIDATION_FIELD = b'"validation/bits_per_byte"'
ENDINGS = ("stopped", "failed", "requeued", "excluded", "gave_up")
"""Events of the record that say why ranks do not run, or run again."""


@dataclass(frozen=True)
class RunStatus:
    """One run, now. What is not known is None."""

    run: str
    """Its folder."""
    recipe: str | None
    """The recipe of its last start: the name of one that comes with Byteloom, or the path of a file."""
    state: str
    """That of its job, while it has one; else running, stopped, finished or failed."""
    reason: str
    """The scheduler's, for that state."""
    job: str | None
    """The scheduler's id of its newest job; None for a run that no scheduler knows."""
    process: int | None
    """Id of the process of this machine that trains the run, or that supervises it in the background. SIGTERM stops
    the run in good order."""
    nodes: str
    """Where it runs."""
    step: int
    """The last one whose numbers are written. A run that is started again begins at its last checkpoint."""
    steps: int | None
    bits_per_byte: float | None
    """Of that step."""
    validation_bits_per_byte: float | None
    """The newest."""
    bytes_per_second: float | None
    seconds_left: float | None
    """Both None while no step is being done."""
    checkpoint_step: int | None
    """Of the newest checkpoint."""
    checkpoint_seconds: float | None
    """Since it was written."""
    starts: int
    """Starts that a person asked for, by `train` or `submit`."""
    restarts: int
    """Starts of the supervisor or the scheduler, within a job."""
    why: str
    """What the newest restart or ending was for."""
    history: list[dict[str, Any]]
    """Lines of launches.jsonl."""


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs at paths, each a run or a folder of runs.

    Raises:
        RunFolderError: there is no run.
    """
    found = []
    for path in paths:
        runs = [path] if _is_run(path) else sorted(filter(_is_run, path.glob("*")))
        if not runs:
            raise RunFolderError(f"{path} is not a run and not a folder of runs; a run has run.json or launches.jsonl")
        found += runs
    return found


def status_of(path: Path) -> RunStatus:
    """How one run fares.

    Raises:
        RunFolderError: it is no run.
    """
    check_run(path)
    folder = RunFolder(path)
    launches = LaunchRecord(path).read()
    submission = last_submission(path)
    is_local = submission is not None and _tree(submission / "cluster.yaml").get("scheduler") == "local"
    job = _job(launches, is_local)
    holder = folder.holder()
    recent = _recent(folder.metrics)
    trained = [line for line in recent if "step_seconds" in line][-RECENT_STEPS:]
    step = recent[-1]["step"] if recent else 0
    resolved = folder.config if folder.config.exists() or submission is None else submission / "config.yaml"
    steps = _steps(resolved)
    state = _state(job, launches, holder is not None, is_done=step == steps)
    bytes_per_second, step_seconds = _speed(trained) if state == Phase.RUNNING else (None, None)
    newest = next(reversed(committed(open_home(folder.checkpoints))), None)
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
        bits_per_byte=trained[-1]["train/bits_per_byte"] if trained else None,
        validation_bits_per_byte=_last_validation(folder.metrics),
        bytes_per_second=bytes_per_second,
        seconds_left=None if step_seconds is None or steps is None else step_seconds * (steps - step),
        checkpoint_step=step_of(newest) if newest else None,
        checkpoint_seconds=time.time() - newest.stat().st_mtime if isinstance(newest, Path) else None,
        starts=max(starts_noted_at(folder.generation), len(started)) - restarts,
        restarts=restarts,
        why=endings[-1].summary if endings else "",
        history=[asdict(launch) for launch in launches],
    )


def check_run(path: Path) -> None:
    """Raises RunFolderError if a path is no run's."""
    if not _is_run(path):
        raise RunFolderError(f"{path} is not a run: it has no run.json and no launches.jsonl")


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("run.json", "launches.jsonl"))


def _job(launches: Sequence[Launch], is_local: bool) -> Job | None:
    """The job that was submitted last, as the scheduler knows it; None for a run that was never submitted."""
    if not launches:
        return None
    last = launches[-1]
    if is_local:
        return _in_the_background(last)
    try:
        return scheduler.job(last.job)
    except SchedulerError as error:
        return Job(last.job, Phase.UNKNOWN, reason=str(error))


def _in_the_background(last: Launch) -> Job:
    """The job of a run in the background of a machine, which is a process there."""
    if is_running(last):
        return Job(last.job, Phase.RUNNING, nodes=platform.node())
    if not last.ends_background and is_elsewhere(last):
        nodes = ",".join(last.nodes)
        return Job(
            last.job, Phase.UNKNOWN, reason=f"process {last.job} of {nodes} cannot be seen from here", nodes=nodes
        )
    return Job(last.job, Phase.FORGOTTEN)


def _place(job: Job | None, is_local: bool, holder: tuple[str, int] | None) -> tuple[int | None, str]:
    """The process of this machine that ends the run, if there is one, and where the run is trained."""
    if job is not None and (job.phase.is_alive or holder is None):
        return int(job.id) if is_local and job.phase is Phase.RUNNING else None, job.nodes
    if holder is None:
        return None, ""
    host, process = holder
    return process if host == platform.node() else None, host


def _state(job: Job | None, launches: Sequence[Launch], is_held: bool, is_done: bool) -> str:
    if job is not None and job.phase.is_alive:
        return job.phase
    if is_held or is_done:
        return Phase.RUNNING if is_held else Phase.FINISHED
    if job is not None and job.phase in (Phase.FAILED, Phase.CANCELLED, Phase.UNKNOWN):
        return job.phase
    return Phase.FAILED if launches and launches[-1].event in ("failed", "gave_up") else "stopped"


def _recent(journal: Path) -> list[dict[str, Any]]:
    """The last lines of metrics.jsonl that are whole."""
    if not journal.exists():
        return []
    with journal.open("rb") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
        file.seek(begin)
        lines = file.read().split(b"\n")
    return [json.loads(line) for line in lines[1 if begin else 0 : -1]]


def _last_validation(journal: Path) -> float | None:
    """Return the newest validation loss in metrics.jsonl; None if there is none. It may be far from the end."""
    if not journal.exists() or not journal.stat().st_size:
        return None
    with journal.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as text:
        found = text.rfind(VALIDATION_FIELD, 0, text.rfind(b"\n") + 1)
        if found < 0:
            return None
        line = text[text.rfind(b"\n", 0, found) + 1 : text.find(b"\n", found)]
    return float(json.loads(line)["validation/bits_per_byte"])


def _speed(steps: Sequence[dict[str, float]]) -> tuple[float | None, float | None]:
    """Bytes a second, and seconds a step, if there is one."""
    if not steps:
        return None, None
    seconds = sum(step["step_seconds"] for step in steps)
    return sum(step["bytes_per_second"] * step["step_seconds"] for step in steps) / seconds, seconds / len(steps)


def _steps(recipe: Path) -> int | None:
    """Of the whole run."""
    return int(_tree(recipe)["train"]["steps"]) if recipe.exists() else None


def _tree(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    return tree
