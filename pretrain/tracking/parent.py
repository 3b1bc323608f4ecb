"""The MLflow run that the runs of a sweep are shown under."""

from collections.abc import Mapping
from pathlib import Path

from pretrain.tracking.config import TrackingConfig
from pretrain.tracking.shipper import RUNS_TAG
from pretrain.tracking.store import MlflowStore


class ParentRun:
    """An MLflow run that others are shown under, and which has ended when all of them have.

    Its methods raise whatever MLflow raises.

    Args:
        store_folder: folder of runs, where the embedded store is.
        runs: how many they are.
        identity: by which it is found again.
        tags: what a person would want to know of it.
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
        """In MLflow's words: SCHEDULED, RUNNING, FINISHED, FAILED or KILLED."""
        self._store.client.update_run(self.id, status=status)
