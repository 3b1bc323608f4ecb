"""Config node of tracking."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel

from byteloom.core.storage.locations import expand_home
from pretrain.tracking.base import TrackerNodes


def _expand_home(uri: str) -> str:
    """Return a URI with `~` expanded in a folder or in the path of an sqlite store."""
    scheme = "sqlite:///" if uri.startswith("sqlite:///~") else ""
    return scheme + expand_home(uri.removeprefix(scheme))


TrackingUri = Annotated[str, AfterValidator(_expand_home)]
"""MLflow tracking URI with the home folder in place of `~`."""


class TrackingConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Trackers that receive the numbers of metrics.jsonl."""

    enabled: bool = True
    """Send the numbers to MLflow. metrics.jsonl is written either way."""
    uri: TrackingUri | None = None
    """MLflow tracking URI, such as http://host:5000. Without one: an sqlite store, mlflow.db, under run.root."""
    experiment: str = "byteloom"
    """MLflow experiment."""
    parent: str | None = None
    """MLflow id of the parent run; `byteloom sweep` and `byteloom compare` set it."""
    trackers: TrackerNodes = {}
    """Other trackers, each by its name with its own fields. Byteloom has tensorboard and wandb; packages may add
    others. Several may be on at once."""

    def store(self, folder: Path) -> str:
        """Return the URI of MLflow: the given one, or that of the embedded store of a folder of runs."""
        return self.uri or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
