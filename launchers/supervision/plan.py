"""Plan of a submission: what the supervisor starts, when it gives up, and where the ranks' files are."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, Field

from byteloom.core.state_files import StateFileError, read_json
from byteloom.core.validation import Seconds
from launchers.supervision.heartbeat import Phase, beat_of


class SuperviseConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Limits after which a run that `byteloom submit` started counts as hung or as hopeless."""

    start_seconds: Seconds = 1200.0
    """From a start until the first step: meeting, loading a checkpoint, compiling."""
    step_seconds: Seconds = 300.0
    """One step, with the wait for its data."""
    evaluation_seconds: Seconds = 3600.0
    """One validation."""
    checkpoint_seconds: Seconds = 1800.0
    """The wait for a checkpoint, and the work at the end of a run."""
    attempts: int = Field(default=3, ge=1)
    """Starts in a row that fail, or reach the time limit, without a newer checkpoint; then the run is given up."""
    faults_of_node: int = Field(default=2, ge=1)
    """Failures that began on one node, after which the job is given other nodes."""

    def seconds_of(self, phase: Phase) -> float:
        """Return the time without a heartbeat after which a rank in this phase counts as hung."""
        return {
            "start": self.start_seconds,
            "step": self.step_seconds,
            "evaluation": self.evaluation_seconds,
            "checkpoint": self.checkpoint_seconds,
            "end": self.checkpoint_seconds,
        }[phase]


@dataclass(frozen=True)
class LaunchPlan:
    """Plan of a submission. The supervisor reads it in the submission's folder."""

    entry: str
    """Train entry, as "module:function"."""
    run: str
    """Path of the run folder."""
    checkpoints: str
    """Home of the run's checkpoints: a folder, or a URL."""
    processes_per_node: int
    cpus_per_process: int
    gpus_per_node: int
    supervise: SuperviseConfig

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        tree = {**vars(self), "supervise": self.supervise.model_dump()}
        path.write_text(json.dumps(tree, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "LaunchPlan":
        """Return the plan of a submission.

        Raises:
            StateFileError: there is none, or it is damaged.
        """
        advice = "submit the run again"
        plan = read_json(path, cls, advice)
        if plan is None:
            raise StateFileError(f"{path} is missing; {advice}")
        return plan


def heartbeats_of(folder: Path, name: str) -> Path:
    """Return the folder of the heartbeats of a start.

    Args:
        folder: folder of the submission.
        name: name of the start.
    """
    return folder / "heartbeats" / name


def output_of(folder: Path, rank: int) -> Path:
    """Return the file with a rank's standard output and error, by the folder of the submission."""
    return folder / "ranks" / f"{beat_of(folder, rank).stem}.log"


def last_error(output: Path) -> str:
    """Return the last line of a rank's output that reports an error; empty if there is none."""
    if not output.exists():
        return ""
    lines = output.read_text(encoding="utf-8", errors="backslashreplace").splitlines()
    wrong = re.compile(r"(rank \d+: )?(error|\w*Error|\w*Exception)\b")
    return next((line for line in reversed(lines) if wrong.match(line)), "")
