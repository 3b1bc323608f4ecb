"""Launch record of a submitted run: RUN/launches.jsonl, one line for each event.

    {"time": 1781000000.0, "event": "failed", "job": "4711", "restart": 1, "nodes": ["n1", "n2"], "step": 40,
     "reason": "rank 2 on n2 was killed by SIGKILL", "faulty": "n2", "fault": "node"}

`byteloom submit` and the supervisor of each start write it. `byteloom status` reads it.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from byteloom.core.storage.state_files import read_lines
from launchers.supervision.heartbeat import FOLDER as HEARTBEATS

log = logging.getLogger(__name__)

Event = Literal[
    "submitted",  # the scheduler has accepted the job
    "started",  # ranks are being started
    "stopped",  # ranks were asked to stop, and have saved
    "failed",  # ranks ended in any other way
    "requeued",  # the supervisor put the job back into the queue
    "slow",  # ranks of a node compute for longer than the others; they run on
    "excluded",  # a node was excluded from the job
    "gave_up",  # there will be no further start; the reason says why
    "finished",  # the last step is done
]


@dataclass(frozen=True)
class Launch:
    """One line of the record."""

    time: float
    """Seconds since 1970."""
    event: Event
    job: str
    """Id of the job, from Slurm or from submitit's local executor."""
    restart: int = 0
    """Number of earlier starts of the ranks."""
    nodes: Sequence[str] = ()
    """Nodes of the ranks."""
    step: int | None = None
    """Step of the newest checkpoint; None before the first."""
    reason: str = ""
    faulty: str = ""
    """Node to blame; empty for none."""
    fault: str = ""
    """Class of a failure; see causes.py. Empty for other events, and in records of earlier versions."""

    @property
    def summary(self) -> str:
        """Event and reason, for people."""
        event = self.event.replace("_", " ")
        return f"{event}: {self.reason}" if self.reason else event

    @property
    def ends_background(self) -> bool:
        """Whether this event ends a run in the background of a machine."""
        return self.event in ("finished", "gave_up", "stopped")


class LaunchRecord:
    """Record of one run. Several processes may write: lines are short and appended whole.

    Args:
        run: the run folder.
        appended: called with each event that this object has written.
    """

    def __init__(self, run: Path, appended: Callable[[Launch], None] = lambda launch: None) -> None:
        self.path = run / "launches.jsonl"
        self._appended = appended
        self._reported: set[str] = set()

    def append(
        self,
        event: Event,
        job: str,
        *,
        restart: int = 0,
        nodes: Sequence[str] = (),
        step: int | None = None,
        reason: str = "",
        faulty: str = "",
        fault: str = "",
    ) -> Launch:
        """Append a line; it is on disk when this returns."""
        launch = Launch(time.time(), event, job, restart, list(nodes), step, reason, faulty, fault)
        with self.path.open("ab+") as file:
            # Half a line of a killed writer must not swallow this one.
            has_half = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
            file.write(b"\n" * has_half + json.dumps(asdict(launch)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._appended(launch)
        return launch

    def read(self, report: Callable[[str], None] = log.warning) -> list[Launch]:
        """Return all whole lines, oldest first; an empty list if nothing was submitted.

        Damaged lines are skipped. The record only counts and explains starts: the fence keeps an older start from
        writing, whatever the record says.

        Args:
            report: called with what is wrong with a line, once for each line.

        Raises:
            StateFileError: the file cannot be read.
        """
        launches = []
        for line in read_lines(self.path, Launch):
            if line.fault and line.fault not in self._reported:
                self._reported.add(line.fault)
                report(line.fault)
            if line.value is not None:
                launches.append(line.value)
        return launches


def submissions_of(run: Path) -> dict[int, Path]:
    """Return the folders of a run's submissions by their numbers, oldest first."""
    folders = {int(path.name): path for path in (run / "jobs").glob("[0-9]*") if path.name.isdecimal()}
    return dict(sorted(folders.items()))


def reason_of_start(run: Path, environment: Mapping[str, str]) -> str:
    """Return why the ranks of a run are being started: what the record says, or the scheduler, or "manual"."""
    if HEARTBEATS in environment:  # a supervisor starts them, and has just recorded it
        launches = LaunchRecord(run).read()
        before = [last for last, launch in pairwise(launches) if launch.event == "started"]
        return before[-1].summary if before else "submitted"
    if (restarts := environment.get("SLURM_RESTART_COUNT", "0")) != "0":
        return f"Slurm requeued job {environment.get('SLURM_JOB_ID')} (restart {restarts})"
    if (restarts := environment.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0":
        return f"torchrun restarted the ranks (restart {restarts})"
    return "manual"


def last_submission(run: Path) -> Path | None:
    """Return the folder of a run's newest submission."""
    submitted = [folder for folder in submissions_of(run).values() if (folder / "cluster.yaml").exists()]
    return submitted[-1] if submitted else None
