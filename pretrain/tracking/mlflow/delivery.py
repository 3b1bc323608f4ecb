"""mlflow.json: what MLflow has received of a run."""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from byteloom.core.storage.files import replace_file
from byteloom.core.storage.state_files import read_json


@dataclass(frozen=True)
class Start:
    """Start of a run."""

    number: int
    """1 for the first start of the run folder."""
    time: float
    """Seconds since 1970."""
    after: int
    """Step of the checkpoint that it resumed from; -1 for a start without a checkpoint."""
    reason: str
    """Why the run was started."""
    changes: tuple[str, ...] = ()
    """Parameters that differ from the start before, each as "name: old -> new"."""

    @property
    def moment(self) -> str:
        """Time in UTC, for people."""
        return datetime.fromtimestamp(self.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

    @property
    def place(self) -> str:
        """Step from which the start continues, in words."""
        return "from the beginning" if self.after < 0 else f"after step {self.after}"


@dataclass
class Delivery:
    """Progress of the deliveries to MLflow, kept in mlflow.json."""

    uri: str
    """MLflow tracking URI."""
    run_id: str | None = None
    """MLflow id of the run; None before the first delivery."""
    delivered_step: int = -1
    """Last step that MLflow has received."""
    sending_step: int = -1
    """Last step of a delivery that was begun; beyond delivered_step only if its end is unknown."""
    status: str = "RUNNING"
    """State that the run should have in MLflow."""
    ended: float | None = None
    """When the start ended, in seconds since 1970; None while it trains."""
    samples_step: int = -1
    """Step of the newest samples that MLflow has received."""
    experiment: str = "byteloom"
    """MLflow experiment."""
    name: str = ""
    """Name of the run."""
    identity: str = ""
    """Identity of the run, by which its MLflow run is found again."""
    params: dict[str, str] = field(default_factory=dict)
    """Parameters of the last start."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the last start."""
    starts: list[dict[str, Any]] = field(default_factory=list)
    """Fields of every Start, oldest first."""
    note: str = ""
    """Description of the run that Byteloom wrote last. A text that differs from it is a person's, and is kept."""

    @classmethod
    def load(cls, path: Path) -> "Delivery | None":
        """Return what mlflow.json holds; None where there is no such file.

        Raises:
            StateFileError: the file cannot be read, or is damaged.
        """
        advice = "start the run with its recipe again, also a finished one: MLflow is then asked what it has"
        return read_json(path, cls, advice)

    def save(self, path: Path) -> None:
        """Write mlflow.json."""
        replace_file(path, json.dumps(vars(self), indent=1))

    def add(self, start: Start) -> None:
        """Add a start of the run."""
        self.starts.append(asdict(start))

    def all_starts(self) -> list[Start]:
        """Return all starts, oldest first."""
        return [Start(**{**start, "changes": tuple(start["changes"])}) for start in self.starts]

    def forget_run(self) -> None:
        """Make the next delivery find or create another MLflow run, and send everything to it."""
        self.run_id, self.note = None, ""
        self.delivered_step = self.sending_step = self.samples_step = -1
