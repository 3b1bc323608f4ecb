"""Plan of a submission: what the supervisor starts, when it gives up, and where the ranks' files are."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, Field

from byteloom.core.storage.state_files import StateFileError, read_json
from byteloom.core.validation import Seconds
from launchers.supervision.heartbeat import Phase
from launchers.supervision.notices import NotifyConfig


class SuperviseConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Limits after which a run of several ranks counts as hung, and a submitted run as failed."""

    start_seconds: Seconds = 1200.0
    """Deadline of the first step, after meeting, loading a checkpoint and compiling."""
    step_seconds: Seconds = 300.0
    """Deadline of one step, with the wait for its data."""
    evaluation_seconds: Seconds = 3600.0
    """Deadline of one validation."""
    checkpoint_seconds: Seconds = 1800.0
    """Deadline of the wait for a checkpoint, and of the work at the end of a run."""
    attempts: int = Field(default=3, ge=1)
    """Starts in a row without a newer checkpoint, after which the run ends as failed. A start counts if the code fails
    or the time limit is reached. Failures of Slurm, of storage, of data and of a node do not count."""
    pause_seconds: Seconds = 30.0
    """Pause before the ranks start again after storage or data failed. It doubles each time, up to five minutes."""
    faults_of_node: int = Field(default=2, ge=1)
    """Failures that began on one node, after which the job is given other nodes."""
    slow_factor: float = Field(default=1.25, gt=1.0)
    """Compute time, relative to the median rank's, at which a rank is slow. It must take so long in three quarters of
    the steps of a window. The wait for other ranks is not counted."""
    slow_steps: int = Field(default=50, ge=10)
    """Steps of a window after which slow ranks are looked for."""
    exclude_slow: bool = False
    """Exclude the node of a slow rank at the next start of the job. The ranks that run are left alone."""
    notify: NotifyConfig = NotifyConfig()
    log_bytes: int = Field(default=256 << 20, ge=1 << 16)
    """Size of a rank's log at which a new one begins. One earlier log is kept."""

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
    gpus_per_node: str
    """Number of GPUs, or their type and number."""
    supervise: SuperviseConfig
    srun: dict[str, str | int | bool] = field(default_factory=dict)
    """More options of `srun`, by their long names."""
    prefix: list[str] = field(default_factory=list)
    """Words before the command of each rank."""

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
