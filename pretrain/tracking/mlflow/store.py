"""Client of an MLflow store or server; no other module imports MLflow or reads its errors."""

import logging
import os
import re
import socket
import sqlite3
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from byteloom.core.faults import FaultClass, chain_of
from byteloom.core.packages import needed_by
from byteloom.core.storage.locks import lock_file

log = logging.getLogger(__name__)

RUN_TAG, PARENT_TAG, NOTE_TAG = "byteloom.run", "mlflow.parentRunId", "mlflow.note.content"
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""Tag of experiments of model training, by which MLflow's page chooses its views."""
VALUES_PER_CALL = 100
"""Parameters or tags that MLflow accepts in one call."""
PARAM_LENGTH, TAG_LENGTH = 6000, 8000
"""Characters of a value that MLflow keeps."""
ARTIFACTS = "mlflow-artifacts"
"""Name of the folder of artifacts, next to an sqlite store."""
REQUEST_SECONDS = 10
"""Timeout of a request."""


class TrackingError(Exception):
    """MLflow cannot be used; the message says why and what to do."""

    fault = FaultClass.FORBIDDEN


class Value(NamedTuple):
    """Value of a metric at a step."""

    name: str
    """Name of the metric."""
    value: float
    """The value, finite."""
    time: float
    """Seconds since 1970."""
    step: int
    """Optimizer steps done."""


class MlflowStore:
    """Client of one MLflow store or server. Its methods raise whatever MLflow raises, or TrackingError.

    Args:
        uri: MLflow tracking URI.

    Raises:
        MissingPackageError: MLflow is not installed.
    """

    def __init__(self, uri: str) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # deliveries are retried as a whole
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a training run contacts the server it was given
        with needed_by("tracking.enabled", "mlflow"):
            from mlflow import MlflowClient, entities  # noqa: PLC0415 (it takes seconds, and few commands use it)

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.uri = uri
        self._entities = entities
        with _sqlite_ready(uri):
            self.client = MlflowClient(uri)

    def find_or_create_experiment(self, name: str) -> str:
        """Return the id of an experiment of model training.

        Raises:
            TrackingError: the experiment was deleted, or the server is not MLflow.
        """
        with _sqlite_ready(self.uri):
            known = self.client.get_experiment_by_name(name)
            if known is None:
                tags = {KIND_TAG: KIND}
                return str(self.client.create_experiment(name, artifact_location=_artifacts_of(self.uri), tags=tags))
        if not known.experiment_id:
            raise TrackingError("something answers there, but it is not MLflow")
        self._check_experiment(known)
        self._mark_as_training(known)
        return str(known.experiment_id)

    def find_or_create_run(self, experiment_id: str, identity: str, name: str, started: float | None = None) -> str:
        """Return the id of the run that has an identity.

        Args:
            experiment_id: of the experiment that is searched.
            identity: by which the run is found.
            name: of a new run.
            started: seconds since 1970; now, if None.
        """
        known = self.find_run(experiment_id, identity)
        if known is not None:
            return known
        start_time = None if started is None else int(started * 1000)
        run = self.client.create_run(experiment_id, start_time, tags={RUN_TAG: identity}, run_name=name)
        return str(run.info.run_id)

    def find_run(self, experiment_id: str, identity: str) -> str | None:
        """Return the id of the run of an experiment that has an identity; None if there is none."""
        known = self.client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{identity}'", max_results=1)
        return str(known[0].info.run_id) if known else None

    def run(self, run_id: str) -> Any:
        """Return a run.

        Raises:
            TrackingError: it was deleted.
        """
        try:
            run = self.client.get_run(run_id)
        except Exception as error:
            if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                raise TrackingError(f"run {run_id} is no longer there") from error
            raise
        if run.info.lifecycle_stage == "deleted":
            self._check_experiment(self.client.get_experiment(run.info.experiment_id))
            raise TrackingError(
                f"run {run_id} was deleted; {self._command('runs restore --run-id', run_id)} restores it"
            )
        return run

    def page_of(self, run: Any) -> str:
        """Return the address of a run's page, under model training; nothing for a store without a server."""
        if not self.uri.startswith(("http://", "https://")):
            return ""
        place = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        return f"{shown(self.uri).rstrip('/')}/{place}?workflowType=machine_learning"

    def mark_as_training(self, run: Any, name: str) -> None:
        """Make MLflow's page list a run under model training.

        MLflow 3.17 lists a run without an output model among the evaluations of GenAI applications. Other versions
        read the kind of the experiment.
        """
        self._mark_as_training(self.client.get_experiment(run.info.experiment_id))
        if _models_of(run):
            return
        model = self.client.create_logged_model(
            run.info.experiment_id, re.sub("[^A-Za-z0-9_-]", "_", name), source_run_id=run.info.run_id
        )
        self.client.log_outputs(run.info.run_id, [self._entities.LoggedModelOutput(model.model_id, step=0)])

    def share_models(self, run_id: str, parent: Any) -> None:
        """Make a run's models outputs of its parent too, so that MLflow's page lists the parent under training."""
        if not _models_of(parent) and (models := _models_of(self.run(run_id))):
            self.client.log_outputs(parent.info.run_id, models)

    def mark_models_ready(self, run_id: str) -> None:
        """Set the state of a run's models to READY."""
        for output in _models_of(self.run(run_id)):
            self.client.finalize_logged_model(output.model_id, "READY")

    def log_values(self, run_id: str, values: Sequence[Value]) -> None:
        """Add metrics; those that MLflow has already change nothing."""
        metrics = [self._entities.Metric(name, value, int(time * 1000), step) for name, value, time, step in values]
        try:
            self.client.log_batch(run_id, metrics=metrics)
        except Exception:
            self.run(run_id)  # a run that was deleted meanwhile has a better message
            raise

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Add parameters, which must be new: MLflow never changes one."""
        entries = [self._entities.Param(key, value[:PARAM_LENGTH]) for key, value in params.items()]
        for first in range(0, len(entries), VALUES_PER_CALL):
            self.client.log_batch(run_id, params=entries[first : first + VALUES_PER_CALL])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        entries = [self._entities.RunTag(key, value[:TAG_LENGTH]) for key, value in tags.items()]
        for first in range(0, len(entries), VALUES_PER_CALL):
            self.client.log_batch(run_id, tags=entries[first : first + VALUES_PER_CALL])

    def _mark_as_training(self, experiment: Any) -> None:
        if not experiment.tags.get(KIND_TAG):  # else a person has chosen
            self.client.set_experiment_tag(experiment.experiment_id, KIND_TAG, KIND)

    def _check_experiment(self, experiment: Any) -> None:
        if experiment.lifecycle_stage == "deleted":
            restore = self._command("experiments restore --experiment-id", experiment.experiment_id)
            raise TrackingError(
                f"experiment {experiment.name} was deleted; {restore} restores it, or choose another "
                "tracking.experiment"
            )

    def _command(self, command: str, identifier: str) -> str:
        return f"`MLFLOW_TRACKING_URI={shown(self.uri)} mlflow {command} {identifier}`"


def shown(uri: str) -> str:
    """Return a tracking URI without the password in it."""
    return re.sub(r"(?<=://)[^/@]*@", "", uri)


def _models_of(run: Any) -> list[Any]:
    """Return the models that are outputs of a run; a server before MLflow 3 has none."""
    return [] if run.outputs is None else list(run.outputs.model_outputs or ())


def fault_of(error: BaseException) -> str:
    """Return in a few words why MLflow could not be used."""
    chain = list(chain_of(error, with_context=True))
    for cause in chain:
        if words := _words(cause):
            return words
    text = str(error)
    if found := re.search(r"too many (\d+) error responses|failed with error code (\d+)", text):
        return f"HTTP {found[1] or found[2]}"
    if "Remote end closed connection" in text:
        return "the server closed the connection"
    if "valid JSON format" in text:
        return "something answers there, but it is not MLflow"
    line = text.partition("\n")[0] or type(error).__name__
    return line if len(line) <= 100 else f"{line[:99]}…"


def _words(cause: BaseException) -> str:
    """Return what an error means that is not of MLflow itself; nothing for an unknown one."""
    kinds: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
        (TrackingError, str(cause)),
        (ConnectionRefusedError, "connection refused"),
        (TimeoutError, "timed out"),
        (socket.gaierror, "no such host"),
        (ssl.SSLError, f"TLS failed: {getattr(cause, 'reason', None)}"),
        (sqlite3.Error, str(cause)),
    )
    for kind, words in kinds:
        if isinstance(cause, kind):
            return words
    return cause.strerror or "" if isinstance(cause, OSError) else ""


def _artifacts_of(uri: str) -> str | None:
    """Return the folder of artifacts next to an sqlite store. A server has its own."""
    database = _sqlite_file(uri)
    return None if database is None else (database.parent / ARTIFACTS).as_uri()


def _sqlite_file(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).absolute() if uri.startswith(prefix) else None


@contextmanager
def _sqlite_ready(uri: str) -> Iterator[None]:
    """Let one process at a time create the tables of an sqlite store: MLflow itself does not guard that.

    Raises:
        OSError, sqlite3.Error: the store cannot be opened, which MLflow itself would try for two minutes.
    """
    database = _sqlite_file(uri)
    if database is None:
        yield
        return
    with lock_file(database.with_name(database.name + ".lock")):
        if _is_half_made(database):
            aside = database.with_name(f"{database.name}.half-made")
            log.warning("%s has no experiment: its maker was killed. It was moved to %s", database, aside.name)
            database.replace(aside)
        yield


def _is_half_made(database: Path) -> bool:
    """Return whether a process was killed while it made the tables of a store. MLflow cannot open such a store.

    The first thing that MLflow writes into the tables is its default experiment.
    """
    with closing(sqlite3.connect(database)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "alembic_version" not in tables:
            return False
        return "experiments" not in tables or not connection.execute("SELECT 1 FROM experiments LIMIT 1").fetchone()
