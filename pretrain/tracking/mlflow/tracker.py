"""The outbox of MLflow for a start of a run."""

import logging
import time
from collections.abc import Callable

from byteloom.core.provenance import changes
from byteloom.core.storage.state_files import StateFileError
from pretrain.tracking.base import RunDescription
from pretrain.tracking.config import TrackingConfig
from pretrain.tracking.mlflow.delivery import Delivery, Start
from pretrain.tracking.mlflow.shipper import MlflowShipper
from pretrain.tracking.mlflow.store import PARENT_TAG
from pretrain.tracking.outbox import Outbox

log = logging.getLogger(__name__)


def open_mlflow(config: TrackingConfig, description: RunDescription, may_write: Callable[[], bool]) -> Outbox:
    """Return the outbox of MLflow for a start of a run, whose mlflow.json it writes.

    Args:
        config: with MLflow enabled.
        description: of the run.
        may_write: as of `Outbox`.
    """
    folder = description.folder
    state, uri = folder / "mlflow.json", config.store(folder.parent)
    try:
        delivery = Delivery.load(state)
    except StateFileError as error:
        log.warning("%s; this start does so", error)
        # A delivery that was begun and whose end is not known: MLflow is asked how far it came.
        sending = description.begins_after
        delivery = Delivery(uri, None, -1, sending, experiment=config.experiment, identity=description.identity)
    place = (uri, config.experiment, description.identity)
    if delivery is None or (delivery.uri, delivery.experiment, delivery.identity) != place:
        delivery = Delivery(uri, experiment=config.experiment, identity=description.identity)
    delivery.name, delivery.status, delivery.ended = description.name, "RUNNING", None
    delivery.samples_step = min(delivery.samples_step, description.begins_after)
    params = {key: str(value) for key, value in description.params.items()}
    if delivery.params != params and max(delivery.delivered_step, delivery.sending_step) > description.begins_after:
        log.info("the recipe has changed: MLflow receives the steps after %d again", description.begins_after)
        delivery.delivered_step = delivery.sending_step = description.begins_after
    changed = tuple(changes(delivery.params, params)) if delivery.params else ()
    delivery.add(Start(description.start, time.time(), description.begins_after, description.reason, changed))
    delivery.params = params
    delivery.tags = {**description.tags, **({PARENT_TAG: config.parent} if config.parent else {})}
    delivery.save(state)
    return Outbox(MlflowShipper(folder), may_write)
