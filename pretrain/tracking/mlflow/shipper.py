"""Bring an MLflow run up to date with a run folder."""

import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from byteloom.core.storage.step_folders import step_in
from pretrain.terminal.losses import loss_at
from pretrain.tracking.journal import JournalLine, lines
from pretrain.tracking.mlflow.delivery import Delivery, Start
from pretrain.tracking.mlflow.store import (
    NOTE_TAG,
    PARAM_LENGTH,
    PARENT_TAG,
    MlflowStore,
    TrackingError,
    Value,
    fault_of,
    shown,
)
from pretrain.tracking.samples import sample_folders

log = logging.getLogger(__name__)

METRICS_PER_CALL = 1000
LOG_BYTES = 200_000
"""Largest part of the end of train.log that is an artifact, in bytes."""
RUNS_TAG = "byteloom.runs"
"""Tag of a run that groups others; its value is their number."""
STARTS = "starts"
"""Metric that counts the starts, at the step from which each continues."""
PARENT_RUN_TAG = "branch.parent"
"""Tag of a branch; its value is the identity of the run that it continues."""
STARTS_DESCRIBED = 20
"""Newest starts that the run's description lists; each start has a tag too."""


class MlflowShipper:
    """Deliveries from a run folder to its MLflow run.

    Everything that a delivery needs is in the run folder, so another process can continue it, also after the run.

    Args:
        folder: the run folder.

    Raises:
        FileNotFoundError: the run has no mlflow.json.
    """

    def __init__(self, folder: Path) -> None:
        names = ("metrics.jsonl", "mlflow.json", "config.yaml", "train.log", "report.html", "samples")
        self.journal, self._state, self._recipe, self._train_log, self._report, self._samples = (
            folder / name for name in names
        )
        self._sent_report: float | None = None
        """Modification time of the report that was sent last."""
        loaded = Delivery.load(self._state)
        if loaded is None:
            raise FileNotFoundError(f"{self._state} does not exist: the run was started without tracking")
        self.delivery = loaded
        self._tried_samples = -1
        """Step of the newest samples that this process has tried to send."""
        self._store: MlflowStore | None = None
        self._saving = threading.Lock()
        self._recipe_was_sent = False
        self._offset = 0
        """Offset in the journal before which every line is delivered, as far as this process knows."""
        self._reported = set[str]()
        """Faults of the journal's lines that were logged."""

    @property
    def place(self) -> str:
        """MLflow and its URI, for messages."""
        return f"MLflow at {shown(self.delivery.uri)}"

    def deliver(self) -> int:
        """Send what MLflow has not received; return the number of steps sent.

        Raises whatever MLflow raises when it cannot be reached. Steps that were sent before that count as delivered.
        """
        store, run_id = self._connected()
        steps, batch = 0, list[Value]()
        last: JournalLine | None = None
        for line in self._undelivered_lines():
            values = _values(line.record)
            if last is not None and len(batch) + len(values) > METRICS_PER_CALL:
                self._send(store, run_id, batch, last)
                batch = []
            batch += values
            last = line
            steps += 1
        if last is not None:
            self._send(store, run_id, batch, last)
        if not self._recipe_was_sent:
            self._recipe_was_sent = True
            self._send_files(store, run_id, with_log=False)
        self._send_report(store, run_id)
        self._send_samples(store, run_id)
        return steps

    def finish(self) -> None:
        """Deliver, and set the run's state in MLflow to the one in mlflow.json."""
        self.deliver()
        if self.delivery.status == "RUNNING":
            return
        store, run_id = self._connected()
        ended = self.delivery.ended
        store.client.set_terminated(run_id, self.delivery.status, None if ended is None else int(1000 * ended))
        self._update_parent(store, run_id)
        if self.delivery.status == "FINISHED":
            store.mark_models_ready(run_id)
        self._send_files(store, run_id, with_log=True)

    def set_status(self, status: str) -> None:
        """Store the state that the run should have in MLflow, and the time: a delivery may come much later."""
        self.delivery.status, self.delivery.ended = status, time.time()
        self._save()

    def undelivered(self) -> int:
        """Return the number of steps that MLflow has not received."""
        return sum(1 for _ in self._undelivered_lines())

    def _save(self) -> None:
        with self._saving:  # the loop's thread and the shipper's both write the file
            self.delivery.save(self._state)

    def _undelivered_lines(self) -> Iterator[JournalLine]:
        for line in lines(self.journal, self._offset, self._report_once):
            if line.record["step"] > self.delivery.delivered_step:
                yield line

    def _report_once(self, fault: str) -> None:
        if fault not in self._reported:
            self._reported.add(fault)
            log.warning("%s", fault)

    def _send(self, store: MlflowStore, run_id: str, batch: list[Value], last: JournalLine) -> None:
        self.delivery.sending_step = last.record["step"]
        self._save()
        store.log_values(run_id, batch)
        self.delivery.delivered_step = last.record["step"]
        self._save()
        self._offset = last.end

    def _send_files(self, store: MlflowStore, run_id: str, *, with_log: bool) -> None:
        """Store the run's files as artifacts. A failure is a warning, since numbers matter more."""
        try:
            if self._recipe.exists():
                store.client.log_artifact(run_id, str(self._recipe))
            if with_log and self._train_log.exists():
                store.client.log_text(run_id, _end_of(self._train_log), self._train_log.name)
        except Exception as error:  # artifact stores have kinds of errors of their own
            log.warning("files of the run were not stored as MLflow artifacts: %s", fault_of(error))

    def _send_report(self, store: MlflowStore, run_id: str) -> None:
        """Store the report as an artifact, if it has changed. A failure is a warning."""
        try:
            changed = self._report.stat().st_mtime if self._report.exists() else None
            if changed != self._sent_report:
                self._sent_report = changed  # before it is sent: a failure is not repeated at each delivery
                store.client.log_artifact(run_id, str(self._report))
        except Exception as error:  # artifact stores have kinds of errors of their own
            log.warning("%s was not stored as an MLflow artifact: %s", self._report.name, fault_of(error))

    def _send_samples(self, store: MlflowStore, run_id: str) -> None:
        """Store new samples as artifacts. A failure is a warning, and the next start repeats it."""
        try:
            for folder in sample_folders(self._samples, after=max(self.delivery.samples_step, self._tried_samples)):
                self._tried_samples = step_in(folder.name)
                store.client.log_artifacts(run_id, str(folder), f"samples/{folder.name}")
                self.delivery.samples_step = self._tried_samples
                self._save()
        except Exception as error:  # artifact stores have kinds of errors of their own
            log.warning("samples were not stored as MLflow artifacts: %s", fault_of(error))

    def _connected(self) -> tuple[MlflowStore, str]:
        """Return the MLflow store and the run's id, with the run there and described."""
        if self._store is not None and self.delivery.run_id is not None:
            return self._store, self.delivery.run_id
        store = MlflowStore(self.delivery.uri)
        starts = self.delivery.all_starts()
        if self.delivery.run_id is None:
            experiment_id = store.find_or_create_experiment(self.delivery.experiment)
            self.delivery.run_id = store.find_or_create_run(
                experiment_id, self.delivery.identity, self.delivery.name, starts[0].time if starts else None
            )
            self._save()
        run_id = self.delivery.run_id
        try:
            run = store.run(run_id)
        except TrackingError as error:
            raise TrackingError(
                f"{error}. When the run has ended, `byteloom track {self._state.parent} --new-run` sends everything to "
                "a new one"
            ) from error
        params = self.delivery.params
        store.log_params(run_id, {key: params[key] for key in params.keys() - run.data.params.keys()})
        if self.delivery.sending_step > self.delivery.delivered_step:
            self.delivery.delivered_step = self._last_step_known_to(store, run_id)
            self._save()
        store.client.update_run(run_id, status="RUNNING")
        changed = _changed(params, run.data.params, run.data.tags)
        unreported = [start for start in starts if f"start.{start.number}" not in run.data.tags]
        store.log_values(run_id, [Value(STARTS, start.number, start.time, max(start.after, 0)) for start in unreported])
        tags = self._parent_tag(store, run) | self.delivery.tags | _tags_of(unreported)
        store.set_tags(run_id, tags | {f"now.{key}": params[key] for key in changed})
        self._describe(store, run, starts, [key for key in changed if params[key] != run.data.params.get(key)])
        self._mark_as_training(store, run)
        if page := store.page_of(run):
            log.info("MLflow page of the run: %s", page)
        self._store = store  # numbers are delivered even if the run above cannot be updated
        self._update_parent(store, run_id)
        return store, run_id

    def _describe(self, store: MlflowStore, run: Any, starts: Sequence[Start], changed: Sequence[str]) -> None:
        """Write the starts into the run's description, unless a person wrote one."""
        found = run.data.tags.get(NOTE_TAG, "")
        if found in ("", self.delivery.note) and any(start.number > 1 for start in starts):
            now = {key: (run.data.params[key], self.delivery.params[key]) for key in changed}
            self.delivery.note = _description(starts, now)
            store.set_tags(run.info.run_id, {NOTE_TAG: self.delivery.note})
            self._save()

    def _parent_tag(self, store: MlflowStore, run: Any) -> dict[str, str]:
        """Return the tag that shows a branch under its parent run, if MLflow has the parent in the same experiment."""
        if PARENT_RUN_TAG not in self.delivery.tags:
            return {}
        parent = store.find_run(run.info.experiment_id, self.delivery.tags[PARENT_RUN_TAG])
        return {} if parent is None else {PARENT_TAG: parent}

    def _mark_as_training(self, store: MlflowStore, run: Any) -> None:
        """List the run under model training, where the server has models; MLflow has them since version 3."""
        try:
            store.mark_as_training(run, self.delivery.name)
        except Exception as error:
            if getattr(error, "error_code", "") != "ENDPOINT_NOT_FOUND":
                raise
            log.debug("the MLflow server has no models: %s", fault_of(error))

    def _update_parent(self, store: MlflowStore, run_id: str) -> None:
        """Set the state of the run that groups this one; it ends when all of its runs have ended."""
        if PARENT_TAG not in self.delivery.tags:
            return
        client = store.client
        parent = client.get_run(self.delivery.tags[PARENT_TAG])
        if RUNS_TAG not in parent.data.tags or parent.info.lifecycle_stage == "deleted":  # not ours
            return
        store.share_models(run_id, parent)
        of_parent, count = f"tags.`{PARENT_TAG}` = '{parent.info.run_id}'", int(parent.data.tags[RUNS_TAG])
        children = client.search_runs([parent.info.experiment_id], of_parent, max_results=count)
        states = {child.info.status for child in children}
        ended = len(children) == count and "RUNNING" not in states
        worst = next((state for state in ("FAILED", "KILLED") if state in states), "FINISHED")
        client.update_run(parent.info.run_id, status=worst if ended else "RUNNING")

    def _last_step_known_to(self, store: MlflowStore, run_id: str) -> int:
        """Return the last step that MLflow has, for a delivery whose end is unknown."""
        client = store.client
        logged = client.get_run(run_id).data.metrics
        steps = (
            metric.step
            for name in filter(None, (loss_at("train", logged), loss_at("validation", logged)))
            for metric in client.get_metric_history(run_id, name)
        )
        return max(steps, default=-1)


def _values(record: Mapping[str, Any]) -> list[Value]:
    """Return the finite numbers of a line of the journal."""
    return [
        Value(name, value, record["time"], record["step"])
        for name, value in record.items()
        if name not in ("time", "step") and math.isfinite(value)
    ]


def _changed(params: Mapping[str, str], known: Mapping[str, str], tags: Mapping[str, str]) -> list[str]:
    """Return the parameters whose value in MLflow is or was out of date, since MLflow never changes a parameter."""
    return [
        key
        for key, value in params.items()
        if value[:PARAM_LENGTH] != known.get(key, value[:PARAM_LENGTH]) or f"now.{key}" in tags
    ]


def _tags_of(starts: Sequence[Start]) -> dict[str, str]:
    tags = {}
    for start in starts:
        tags[f"start.{start.number}"] = f"{start.place}: {start.reason} ({start.moment})"
        if start.changes:
            tags[f"start.{start.number}.changes"] = "; ".join(start.changes)
    return tags


def _description(starts: Sequence[Start], changed: Mapping[str, tuple[str, str]]) -> str:
    """Return Markdown about the starts, and about the parameters whose value in MLflow is out of date.

    MLflow's page shows only the first lines until a person expands it.

    Args:
        starts: of the run, oldest first.
        changed: (first value, present value) of each.
    """
    newest = starts[-1]
    text = [f"Start {newest.number} continues {newest.place}: {newest.reason} ({newest.moment})", ""]
    if changed:
        values = ", ".join(f"`{name}` {now} (at first {first})" for name, (first, now) in changed.items())
        text += [f"Parameters now: {values}. The table of parameters keeps the first values.", ""]
    text += ["| start | continues | time | reason | changes |", "| --- | --- | --- | --- | --- |"]
    for start in reversed(starts[-STARTS_DESCRIBED:]):
        cells = (start.number, start.place, start.moment, start.reason, "; ".join(start.changes))
        text += ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ")[:300] for cell in cells) + " |"]
    return "\n".join(text)


def _end_of(path: Path) -> str:
    """Return the whole lines at the end of a log."""
    with path.open("rb") as file:
        skipped = max(0, file.seek(0, os.SEEK_END) - LOG_BYTES)
        file.seek(skipped)
        text = file.read().decode("utf-8", "replace")
    return text.partition("\n")[2] if skipped else text
