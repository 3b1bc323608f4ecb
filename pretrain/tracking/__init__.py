"""Numbers and files of a run: a journal on disk that is always right, and trackers.

    loop ─▶ Recorder ─┬─▶ Journal (metrics.jsonl, one line a step) ─▶ MlflowShipper (a thread) ─▶ MLflow store or server
                      │                 mlflow.json, config.yaml, train.log ─┘
                      └─▶ BackgroundTracker (a thread each) ─▶ trackers of other packages (base.py has the contract)

The loop writes a line and continues; no tracker raises into it or delays it. The shipper reads the run folder itself
and records how much MLflow has received (mlflow.json). A dead server, a killed process or a finished run therefore
loses no number: the next start of the run delivers them, or `byteloom track`.
"""

from pretrain.tracking.base import TRACKERS, RunDescription, Tracker, TrackerEntry, register_tracker
from pretrain.tracking.config import TrackingConfig
from pretrain.tracking.delivery import Delivery, Start
from pretrain.tracking.evaluations import store_evaluation
from pretrain.tracking.journal import Journal
from pretrain.tracking.mlflow_tracker import deliver_all
from pretrain.tracking.parent import ParentRun
from pretrain.tracking.recorder import Recorder, open_recorder
from pretrain.tracking.shipper import MlflowShipper
from pretrain.tracking.store import TrackingError, fault_of, shown

__all__ = [
    "TRACKERS",
    "Delivery",
    "Journal",
    "MlflowShipper",
    "ParentRun",
    "Recorder",
    "RunDescription",
    "Start",
    "Tracker",
    "TrackerEntry",
    "TrackingConfig",
    "TrackingError",
    "deliver_all",
    "fault_of",
    "open_recorder",
    "register_tracker",
    "shown",
    "store_evaluation",
]
