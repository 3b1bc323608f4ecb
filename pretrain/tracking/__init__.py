"""Numbers and files of a run: a journal on disk that is always right, and trackers.

    loop ─▶ Recorder ─▶ Journal (metrics.jsonl, one line a step)
                               │
    samples, report, log ──────┼─▶ Outbox (a thread) ─▶ MlflowShipper ─────▶ MLflow store or server
                               └─▶ Outbox (a thread) ─▶ RegisteredShipper ─▶ TensorBoard, W&B, those of other packages

The loop writes a line and continues; no tracker raises into it or delays it. An outbox reads the run folder itself
and records what its tracker has received: mlflow.json, trackers/NAME.json. A dead server, a killed process or a
finished run therefore loses no number: the next start of the run delivers them, or `byteloom track`.
"""

from pretrain.tracking.base import TRACKERS, RunDescription, Tracker, TrackerEntry, register_tracker
from pretrain.tracking.config import TrackingConfig
from pretrain.tracking.journal import Journal
from pretrain.tracking.mlflow.delivery import Delivery, Start
from pretrain.tracking.mlflow.evaluations import store_evaluation
from pretrain.tracking.mlflow.parent import ParentRun
from pretrain.tracking.mlflow.shipper import MlflowShipper
from pretrain.tracking.mlflow.store import TrackingError, fault_of, shown
from pretrain.tracking.outbox import Shipper, deliver_all
from pretrain.tracking.recorder import Recorder, open_recorder
from pretrain.tracking.registered import RegisteredShipper, registered_in

__all__ = [
    "TRACKERS",
    "Delivery",
    "Journal",
    "MlflowShipper",
    "ParentRun",
    "Recorder",
    "RegisteredShipper",
    "RunDescription",
    "Shipper",
    "Start",
    "Tracker",
    "TrackerEntry",
    "TrackingConfig",
    "TrackingError",
    "deliver_all",
    "fault_of",
    "open_recorder",
    "register_tracker",
    "registered_in",
    "shown",
    "store_evaluation",
]
