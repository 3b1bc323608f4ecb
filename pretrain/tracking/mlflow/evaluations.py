"""Evaluations of a run as artifacts of its MLflow run."""

import logging
from pathlib import Path

from pretrain.tracking.mlflow.delivery import Delivery
from pretrain.tracking.mlflow.store import MlflowStore, TrackingError, fault_of, shown

log = logging.getLogger(__name__)


def store_evaluation(state: Path, files: Path, place: str) -> None:
    """Store the files of an evaluation as artifacts of its run. A failure is a warning.

    The run may be training meanwhile, so its state in MLflow and mlflow.json stay as they are.

    Args:
        state: the run's mlflow.json.
        files: folder of the files.
        place: folder among the run's artifacts.
    """
    uri = "the tracking URI"
    try:
        delivery = Delivery.load(state)
        if delivery is None:
            return
        uri = shown(delivery.uri)
        if delivery.run_id is None:
            raise TrackingError(f"the run is not there yet; `byteloom track {state.parent}` sends it")
        store = MlflowStore(delivery.uri)
        store.run(delivery.run_id)
        store.client.log_artifacts(delivery.run_id, str(files), place)
    except Exception as error:  # whatever MLflow does wrong, the evaluation itself is done
        log.warning("MLflow at %s: %s. The evaluation is not among the run's artifacts", uri, fault_of(error))
