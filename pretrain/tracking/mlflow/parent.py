"""MLflow run that groups the runs of a sweep."""

from collections.abc import Mapping
from pathlib import Path

from pretrain.tracking.config import TrackingConfig
from pretrain.tracking.mlflow.shipper import RUNS_TAG
from pretrain.tracking.mlflow.store import MlflowStore


class ParentRun:
    """MLflow run that groups others, and ends when all of them have ended.

    Its methods raise whatever MLflow raises.

    Args:
        config: names the store and the experiment.
        store_folder: folder of runs, where the embedded store is.
        name: of the MLflow run.
        identity: by which the MLflow run is found again.
        runs: number of runs in the group.
        tags: of the MLflow run.
    """

    def __init__(
        self, config: TrackingConfig, store_folder: Path, name: str, identity: str, runs: int, tags: Mapping[str, str]
    ) -> None:
        store_folder.mkdir(parents=True, exist_ok=True)
        self._store = MlflowStore(config.store(store_folder))
        experiment_id = self._store.find_or_create_experiment(config.experiment)
        self.id = self._store.find_or_create_run(experiment_id, identity, name)
        self._store.set_tags(self.id, {**tags, RUNS_TAG: str(runs)})

    def set_status(self, status: str) -> None:
        """Set the state, in MLflow's words: SCHEDULED, RUNNING, FINISHED, FAILED or KILLED."""
        self._store.client.update_run(self.id, status=status)
