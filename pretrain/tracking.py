"""Numbers of a run: a journal on disk that is always right, and MLflow, told from the journal when it answers.

    loop ─▶ Journal (metrics.jsonl, one line a step) ─▶ MlflowShipper (a thread) ─▶ MLflow store or server

The loop writes a line and goes on; nothing it calls raises or waits because of MLflow. The shipper reads the journal
itself and keeps how far it has got (mlflow.json), so a dead server, a killed process or a finished run loses no number:
they are delivered when the run is next started, or by `byteloom track`. A step that a killed run computes again is not
sent again: its numbers are the same. After a change of the recipe they are not, and then they are sent anew.
"""

import fcntl
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from byteloom.core.packages import MissingPackageError, needed_by
from data_pipeline.atomic import replace_file, sync

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
METRICS_PER_CALL = 1000
PARAMS_PER_CALL = 100
FINAL_DELIVERY_SECONDS = 90.0
PARENT_TAG, RUNS_TAG = "mlflow.parentRunId", "byteloom.runs"


class TrackingConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Where numbers go beside metrics.jsonl."""

    enabled: bool = True
    """Tell MLflow. metrics.jsonl is written either way."""
    uri: str | None = None
    """MLflow tracking URI, such as http://host:5000. Without one: an sqlite store, mlflow.db, under run.root."""
    experiment: str = "byteloom"
    """MLflow experiment."""
    parent: str | None = None
    """MLflow id of the run that this one is shown under; `byteloom sweep` sets it."""

    def store(self, folder: Path) -> str:
        """Where numbers go: the URI, or else the embedded store of a folder of runs."""
        return self.uri or f"sqlite:///{(folder / 'mlflow.db').resolve()}"


class Journal:
    """metrics.jsonl: one JSON object a line, each with `step` and `time` (seconds since 1970)."""

    def __init__(self, path: Path, last_step: int | None) -> None:
        """Opens the journal to go on after `last_step`; what an interrupted attempt wrote beyond it is dropped.

        Args:
            last_step: of the checkpoint the run resumes from; None begins anew.
        """
        self.path = path
        kept = [] if last_step is None else [line.text for line in _lines(path) if line.record["step"] <= last_step]
        replace_file(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Puts what was appended on disk."""
        sync(self.path)

    def close(self) -> None:
        self._file.close()


class _Line(NamedTuple):
    record: dict[str, Any]
    text: str
    end: int
    """Offset in the file just after the line."""


def _lines(path: Path, offset: int = 0) -> Iterator[_Line]:
    """The journal's whole lines from an offset on; a last line without its end is still being written, or never was."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _Line(json.loads(line), line.decode(), offset)


@dataclass(frozen=True)
class RunDescription:
    """What MLflow is told once about a run."""

    name: str
    identity: str
    params: Mapping[str, Any]
    """Dotted config fields; MLflow keeps the values of the first start."""
    tags: Mapping[str, str]
    """Of this start; they replace those of an earlier one."""
    begins_after: int
    """The step whose checkpoint this start goes on from; -1 for a start from nothing."""


@dataclass
class Delivery:
    """What is known about MLflow's side, kept in mlflow.json."""

    uri: str
    run_id: str | None = None
    delivered_step: int = -1
    sending_step: int = -1
    """The last step of a delivery that was begun; beyond delivered_step only if its end is not known."""
    status: str = "RUNNING"
    """What the run's state in MLflow should be."""
    experiment: str = "byteloom"
    name: str = ""
    identity: str = ""
    params: dict[str, str] = field(default_factory=dict)
    """Of the last start."""
    tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Delivery | None":
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def save(self, path: Path) -> None:
        replace_file(path, json.dumps(vars(self), indent=1))


class MlflowShipper:
    """Brings an MLflow run up to date with a journal.

    Everything it needs lies in the run folder, so it can go on in another process, also after the run has ended.
    """

    def __init__(self, journal: Path, state: Path) -> None:
        self._journal = journal
        self._state = state
        loaded = Delivery.load(state)
        if loaded is None:
            raise FileNotFoundError(f"{state} does not exist: the run was started without tracking")
        self.delivery = loaded
        self._client: Any = None
        self._saving = threading.Lock()
        self._offset = 0
        """Where in the journal undelivered lines begin, as far as this process knows."""

    def deliver(self) -> int:
        """Sends what MLflow has not received; returns the number of steps sent.

        Raises whatever MLflow raises when it cannot be reached; what was sent before counts.
        """
        client = self._connected()
        from mlflow.entities import Metric  # noqa: PLC0415 see _connected

        steps, batch = 0, list[Metric]()
        last: _Line | None = None
        for line in self._undelivered_lines():
            timestamp, step = int(line.record["time"] * 1000), line.record["step"]
            values = {key: value for key, value in line.record.items() if key not in ("time", "step")}
            metrics = [Metric(key, value, timestamp, step) for key, value in values.items() if math.isfinite(value)]
            if last is not None and len(batch) + len(metrics) > METRICS_PER_CALL:
                self._send(client, batch, last)
                batch = []
            batch += metrics
            last = line
            steps += 1
        if last is not None:
            self._send(client, batch, last)
        return steps

    def finish(self) -> None:
        """Delivers, and sets the run's state in MLflow to the one in mlflow.json."""
        self.deliver()
        if self.delivery.status != "RUNNING":
            client = self._connected()
            client.set_terminated(self.delivery.run_id, self.delivery.status)
            self._tell_parent(client)

    def set_status(self, status: str) -> None:
        self.delivery.status = status
        self._save()

    def _save(self) -> None:
        with self._saving:  # the loop's thread and the shipper's both write the file
            self.delivery.save(self._state)

    def undelivered(self) -> int:
        """Steps that MLflow has not received."""
        return sum(1 for _ in self._undelivered_lines())

    def _undelivered_lines(self) -> Iterator[_Line]:
        for line in _lines(self._journal, self._offset):
            if line.record["step"] > self.delivery.delivered_step:
                yield line

    def _send(self, client: Any, metrics: list[Any], last: _Line) -> None:
        self.delivery.sending_step = last.record["step"]
        self._save()
        client.log_batch(self.delivery.run_id, metrics=metrics)
        self.delivery.delivered_step = last.record["step"]
        self._save()
        self._offset = last.end

    def _connected(self) -> Any:
        """The MLflow client, with the run there and described."""
        if self._client is not None:
            return self._client
        client, experiment_id = _connect(self.delivery.uri, self.delivery.experiment)
        from mlflow.entities import Param, RunTag  # noqa: PLC0415 see _connect

        if self.delivery.run_id is None:
            self.delivery.run_id = _find_or_create_run(
                client, experiment_id, self.delivery.identity, self.delivery.name
            )
            self._save()
        run = client.get_run(self.delivery.run_id)
        unknown = [Param(key, value) for key, value in self.delivery.params.items() if key not in run.data.params]
        for first in range(0, len(unknown), PARAMS_PER_CALL):
            client.log_batch(self.delivery.run_id, params=unknown[first : first + PARAMS_PER_CALL])
        if self.delivery.sending_step > self.delivery.delivered_step:
            self.delivery.delivered_step = self._last_step_known_to(client)
        client.update_run(self.delivery.run_id, status="RUNNING")
        client.log_batch(self.delivery.run_id, tags=[RunTag(key, value) for key, value in self.delivery.tags.items()])
        self._client = client  # numbers are delivered even if the run above cannot be told
        self._tell_parent(client)
        return client

    def _tell_parent(self, client: Any) -> None:
        """Whatever has become of the run that this one is shown under: it has ended when all of its runs have."""
        if PARENT_TAG not in self.delivery.tags:
            return
        parent = client.get_run(self.delivery.tags[PARENT_TAG])
        if RUNS_TAG not in parent.data.tags:  # none of ours
            return
        of_parent, count = f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'", int(parent.data.tags[RUNS_TAG])
        children = client.search_runs([parent.info.experiment_id], of_parent, max_results=count)
        states = {child.info.status for child in children}
        ended = len(children) == count and "RUNNING" not in states
        worst = next((state for state in ("FAILED", "KILLED") if state in states), "FINISHED")
        client.update_run(parent.info.run_id, status=worst if ended else "RUNNING")

    def _last_step_known_to(self, client: Any) -> int:
        """Asked when a process was killed between sending steps and noting that they had arrived."""
        steps = (
            metric.step
            for name in ("train/bits_per_byte", "validation/bits_per_byte")
            for metric in client.get_metric_history(self.delivery.run_id, name)
        )
        return max(steps, default=-1)


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

    def close(self, status: str) -> None:
        """Delivers what is left, for a bounded time.

        Args:
            status: MLflow's word for how it ended: FINISHED, KILLED or FAILED.
        """
        self.journal.close()
        if self._shipper is None or self._thread is None or not self._may_write():
            return
        try:
            self._shipper.set_status(status)
        except OSError as error:  # a full disk: the run's own fate must not change for it
            log.warning("how the run ended could not be noted for MLflow: %s", error)
        self._end.set()
        self._thread.join(FINAL_DELIVERY_SECONDS)
        if missing := self._shipper.undelivered():
            log.warning(
                "%d steps could not be delivered to MLflow at %s; they are safe in %s, and "
                "`byteloom track %s` delivers them",
                missing,
                self._shipper.delivery.uri,
                self.journal.path,
                self.journal.path.parent,
            )

    def _ship(self, shipper: MlflowShipper) -> None:
        pause, failing = POLL_SECONDS, False
        while True:
            ending = self._end.wait(pause)
            if not self._may_write():
                return
            try:
                if ending:
                    shipper.finish()
                else:
                    shipper.deliver()
                if failing:
                    log.info("MLflow at %s answers again", shipper.delivery.uri)
                pause, failing = POLL_SECONDS, False
            except MissingPackageError as error:
                log.warning("%s; training goes on, and the numbers are in %s", error, self.journal.path)
                return
            except Exception as error:
                # Whatever MLflow does wrong, training goes on, and the journal has the numbers.
                if not failing:
                    log.warning(
                        "MLflow at %s cannot be told (%s); the numbers stay in %s and are delivered when it answers",
                        shipper.delivery.uri,
                        str(error).partition("\n")[0],
                        self.journal.path,
                    )
                pause, failing = min(2 * pause, LONGEST_PAUSE_SECONDS), True
            if ending:
                return


def open_tracker(
    config: TrackingConfig,
    journal: Journal,
    state: Path,
    store_folder: Path,
    description: RunDescription,
    may_write: Callable[[], bool] = lambda: True,
) -> Tracker:
    """The tracker of a start of a run.

    Args:
        may_write: as of Tracker.
        state: the run's mlflow.json.
        store_folder: where the embedded store lies, when the config names no server.
    """
    if not config.enabled:
        return Tracker(journal, None, may_write)
    delivery = Delivery.load(state)
    uri = config.store(store_folder)
    place = (uri, config.experiment, description.identity)
    if delivery is None or (delivery.uri, delivery.experiment, delivery.identity) != place:
        delivery = Delivery(uri, experiment=config.experiment, identity=description.identity)
    delivery.name, delivery.status = description.name, "RUNNING"
    params = {key: str(value) for key, value in description.params.items()}
    if delivery.params != params and max(delivery.delivered_step, delivery.sending_step) > description.begins_after:
        log.info("steps after %d are told to MLflow anew: the recipe has changed", description.begins_after)
        delivery.delivered_step = delivery.sending_step = description.begins_after
    delivery.params = params
    delivery.tags = {**description.tags, **({PARENT_TAG: config.parent} if config.parent else {})}
    delivery.save(state)
    return Tracker(journal, MlflowShipper(journal.path, state), may_write)


class ParentRun:
    """An MLflow run that others are shown under, and which has ended when all of them have.

    What is asked of it raises whatever MLflow raises.

    Args:
        store_folder: as of `open_tracker`.
        runs: how many they are.
        identity: by which it is found again.
        tags: what a person would want to know of it.
    """

    def __init__(
        self, config: TrackingConfig, store_folder: Path, name: str, identity: str, runs: int, tags: Mapping[str, str]
    ) -> None:
        store_folder.mkdir(parents=True, exist_ok=True)
        self._client, experiment_id = _connect(config.store(store_folder), config.experiment)
        self.id = _find_or_create_run(self._client, experiment_id, identity, name)
        for key, value in {**tags, RUNS_TAG: str(runs)}.items():
            self._client.set_tag(self.id, key, value)

    def set_status(self, status: str) -> None:
        """In MLflow's words: SCHEDULED, RUNNING, FINISHED, FAILED or KILLED."""
        self._client.update_run(self.id, status=status)


def _connect(uri: str, experiment: str) -> tuple[Any, str]:
    """Return the MLflow client, and the id of an experiment, made if need be.

    MLflow is imported here, as it takes seconds.

    Raises:
        MissingPackageError: MLflow is not installed.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # the shipper's own pauses do that
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    with needed_by("tracking.enabled", "mlflow"):
        from mlflow import MlflowClient  # noqa: PLC0415

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with _store_lock(uri):
        client = MlflowClient(uri)
        known = client.get_experiment_by_name(experiment)
        return client, known.experiment_id if known else client.create_experiment(experiment)


def _find_or_create_run(client: Any, experiment_id: str, identity: str, name: str) -> str:
    known = client.search_runs([experiment_id], f"tags.`byteloom.run` = '{identity}'", max_results=1)
    if known:
        return str(known[0].info.run_id)
    return str(client.create_run(experiment_id, tags={"byteloom.run": identity}, run_name=name).info.run_id)


@contextmanager
def _store_lock(uri: str) -> Iterator[None]:
    """Lets one process at a time create the tables of an sqlite store: MLflow itself does not guard that."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    with database.with_name(database.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
