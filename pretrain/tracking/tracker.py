"""The tracker of a start of a run: it takes numbers from the loop and has a thread deliver them to MLflow."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel

from byteloom.core.locations import expand_home
from byteloom.core.packages import MissingPackageError
from byteloom.core.provenance import changes
from byteloom.core.state_files import StateFileError
from pretrain.tracking.delivery import Delivery, Start
from pretrain.tracking.journal import Journal
from pretrain.tracking.shipper import MlflowShipper
from pretrain.tracking.store import PARENT_TAG, fault_of, shown

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
FINAL_DELIVERY_SECONDS = 90.0
HURRIED_DELIVERY_SECONDS = 10.0
"""Time for the final delivery after a request to stop: who asks for it may kill the process soon."""


def _expand_home(uri: str) -> str:
    """Return a URI with `~` expanded in a folder or in the path of an sqlite store."""
    scheme = "sqlite:///" if uri.startswith("sqlite:///~") else ""
    return scheme + expand_home(uri.removeprefix(scheme))


TrackingUri = Annotated[str, AfterValidator(_expand_home)]


class TrackingConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Where numbers go beside metrics.jsonl."""

    enabled: bool = True
    """Tell MLflow. metrics.jsonl is written either way."""
    uri: TrackingUri | None = None
    """MLflow tracking URI, such as http://host:5000. Without one: an sqlite store, mlflow.db, under run.root."""
    experiment: str = "byteloom"
    """MLflow experiment."""
    parent: str | None = None
    """MLflow id of the run that this one is shown under; `byteloom sweep` sets it."""

    def store(self, folder: Path) -> str:
        """Return where numbers go: the URI, or else the embedded store of a folder of runs."""
        return self.uri or f"sqlite:///{(folder / 'mlflow.db').resolve()}"


@dataclass(frozen=True)
class RunDescription:
    """What a start tells MLflow about its run."""

    name: str
    identity: str
    params: Mapping[str, Any]
    """Dotted config fields."""
    tags: Mapping[str, str]
    """Of this start; they replace those of an earlier one."""
    begins_after: int
    """The step whose checkpoint this start continues from; -1 for a start without a checkpoint."""
    start: int
    """Number of this start; 1 for the first."""
    reason: str
    """Why the run was started."""


class Tracker:
    """Takes numbers from the loop; never raises into it and never makes it wait.

    Args:
        may_write: asked before MLflow and mlflow.json are touched: whether the run is still this process's.
    """

    def __init__(
        self, journal: Journal, shipper: MlflowShipper | None, may_write: Callable[[], bool] = lambda: True
    ) -> None:
        self.journal = journal
        self._may_write = may_write
        self._shipper = shipper
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        if shipper is not None:
            self._thread = threading.Thread(target=self._ship, args=(shipper,), name="mlflow", daemon=True)
            self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.journal.append(step, metrics)

    def close(self, status: str, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """Deliver what is left, for a bounded time.

        Args:
            status: MLflow's word for how it ended: FINISHED, KILLED or FAILED.
            is_hurried: whether the process has been asked to stop, so that there is less time.
        """
        self.journal.close()
        if self._shipper is None or self._thread is None or not self._may_write():
            return
        try:
            self._shipper.set_status(status)
        except OSError as error:  # a full disk: the run's own fate must not change for it
            log.warning("mlflow.json does not say how the run ended: %s", error)
        self._end.set()
        begin = time.monotonic()
        while self._thread.is_alive():
            limit = HURRIED_DELIVERY_SECONDS if is_hurried() else FINAL_DELIVERY_SECONDS
            if time.monotonic() - begin > limit:
                break
            self._thread.join(0.1)
        if missing := self._shipper.undelivered():
            log.warning(
                "%d steps did not reach MLflow at %s; they are safe in %s, and `byteloom track %s` sends them",
                missing,
                shown(self._shipper.delivery.uri),
                self.journal.path,
                self.journal.path.parent,
            )

    def _ship(self, shipper: MlflowShipper) -> None:
        pause, faults = POLL_SECONDS, set[str]()
        while True:
            ending = self._end.wait(pause)
            if not self._may_write():
                return
            try:
                if ending:
                    shipper.finish()
                else:
                    shipper.deliver()
                if faults:
                    log.info("MLflow at %s answers again", shown(shipper.delivery.uri))
                pause, faults = POLL_SECONDS, set()
            except MissingPackageError as error:
                log.warning("%s; training continues, and the numbers are in %s", error, self.journal.path)
                return
            except Exception as error:
                # Whatever MLflow does wrong, training continues, and the journal has the numbers.
                if (fault := fault_of(error)) not in faults:
                    log.warning(
                        "MLflow at %s: %s. Training continues; the numbers are safe in %s",
                        shown(shipper.delivery.uri),
                        fault,
                        self.journal.path,
                    )
                pause, faults = min(2 * pause, LONGEST_PAUSE_SECONDS), faults | {fault}
            if ending:
                return


def open_tracker(
    config: TrackingConfig,
    journal: Journal,
    state: Path,
    store_folder: Path,
    description: RunDescription,
    may_write: Callable[[], bool] = lambda: True,
    *,
    recipe: Path,
    train_log: Path,
) -> Tracker:
    """Return the tracker of a start of a run.

    Args:
        state: the run's mlflow.json.
        store_folder: where the embedded store lies, when the config names no server.
        may_write: as of Tracker.
        recipe, train_log: as of MlflowShipper.
    """
    if not config.enabled:
        return Tracker(journal, None, may_write)
    uri = config.store(store_folder)
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
    delivery.name, delivery.status = description.name, "RUNNING"
    params = {key: str(value) for key, value in description.params.items()}
    if delivery.params != params and max(delivery.delivered_step, delivery.sending_step) > description.begins_after:
        log.info("the recipe has changed: MLflow receives the steps after %d again", description.begins_after)
        delivery.delivered_step = delivery.sending_step = description.begins_after
    changed = tuple(changes(delivery.params, params)) if delivery.params else ()
    delivery.add(Start(description.start, time.time(), description.begins_after, description.reason, changed))
    delivery.params = params
    delivery.tags = {**description.tags, **({PARENT_TAG: config.parent} if config.parent else {})}
    delivery.save(state)
    return Tracker(journal, MlflowShipper(journal.path, state, recipe, train_log), may_write)
