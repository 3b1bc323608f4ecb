"""Numbers and files of a run: a journal on disk that is always right, and MLflow, which is told from the run folder.

    loop ─▶ Journal (metrics.jsonl, one line a step) ─▶ MlflowShipper (a thread) ─▶ MLflow store or server
                        mlflow.json, config.yaml, train.log ─┘

The loop writes a line and continues; nothing it calls raises or waits because of MLflow. The shipper reads the run
folder itself and records how much MLflow has received (mlflow.json). A dead server, a killed process or a finished
run therefore loses no number: the next start of the run delivers them, or `byteloom track`.
"""

from pretrain.tracking.delivery import Delivery, Start
from pretrain.tracking.evaluations import store_evaluation
from pretrain.tracking.journal import Journal
from pretrain.tracking.parent import ParentRun
from pretrain.tracking.shipper import MlflowShipper
from pretrain.tracking.store import TrackingError, fault_of, shown
from pretrain.tracking.tracker import RunDescription, Tracker, TrackingConfig, open_tracker

__all__ = [
    "Delivery",
    "Journal",
    "MlflowShipper",
    "ParentRun",
    "RunDescription",
    "Start",
    "Tracker",
    "TrackingConfig",
    "TrackingError",
    "fault_of",
    "open_tracker",
    "shown",
    "store_evaluation",
]
