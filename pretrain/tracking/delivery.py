"""mlflow.json: what a run folder knows about MLflow's side of the run."""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from byteloom.core.files import replace_file
from byteloom.core.state_files import read_json


@dataclass(frozen=True)
class Start:
    """A start of a run."""

    number: int
    """1 for the first start of the run folder."""
    time: float
    """Seconds since 1970."""
    after: int
    """Step of the checkpoint that it resumed from; -1 for a start without a checkpoint."""
    reason: str
    changes: tuple[str, ...] = ()
    """Parameters that differ from the start before, each as "name: old -> new"."""

    @property
    def moment(self) -> str:
        return datetime.fromtimestamp(self.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

    @property
    def place(self) -> str:
        return "from the beginning" if self.after < 0 else f"after step {self.after}"


@dataclass
class Delivery:
    """What is known about MLflow's side, kept in mlflow.json."""

    uri: str
    run_id: str | None = None
    delivered_step: int = -1
    sending_step: int = -1
    """Last step of a delivery that was begun; beyond delivered_step only if its end is not known."""
    status: str = "RUNNING"
    """What the run's state in MLflow should be."""
    experiment: str = "byteloom"
    name: str = ""
    identity: str = ""
    params: dict[str, str] = field(default_factory=dict)
    """Parameters of the last start."""
    tags: dict[str, str] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    """Fields of every Start, oldest first."""
    note: str = ""
    """Description of the run that Byteloom wrote last; a person's own text differs from it, and is kept."""

    @classmethod
    def load(cls, path: Path) -> "Delivery | None":
        """Return what mlflow.json holds; None where there is no such file.

        Raises:
            StateFileError: the file cannot be read, or is damaged.
        """
        advice = "start the run with its recipe again, also a finished one: MLflow is then asked what it has"
        return read_json(path, cls, advice)

    def save(self, path: Path) -> None:
        replace_file(path, json.dumps(vars(self), indent=1))

    def add(self, start: Start) -> None:
        self.starts.append(asdict(start))

    def all_starts(self) -> list[Start]:
        return [Start(**{**start, "changes": tuple(start["changes"])}) for start in self.starts]

    def forget_run(self) -> None:
        """Have everything delivered to another MLflow run, which the next delivery finds or creates."""
        self.run_id, self.note = None, ""
        self.delivered_step = self.sending_step = -1
