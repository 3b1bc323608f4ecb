"""Deliveries of a run to a registered tracker.

metrics.jsonl, samples/ ─▶ RegisteredShipper ─▶ Tracker
                                  └─▶ RUN/trackers/NAME.json: the last step that the tracker has taken
"""

import json
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from byteloom.core.storage.files import replace_file
from byteloom.core.storage.state_files import StateFileError, read_json
from byteloom.core.storage.step_folders import step_in
from pretrain.tracking.base import TRACKERS, RunDescription, Tracker
from pretrain.tracking.journal import JournalLine, lines
from pretrain.tracking.outbox import Outbox
from pretrain.tracking.samples import read_samples, sample_folders

log = logging.getLogger(__name__)

FOLDER = "trackers"
"""Folder of the state files in a run folder."""
STEPS_PER_FLUSH = 1000


@dataclass
class TrackerState:
    """Progress of the deliveries to a tracker, and all that another process needs to continue them."""

    tracker: str
    """Name of the tracker."""
    config: dict[str, Any]
    """Fields of its node."""
    name: str
    """Name of the run. The fields below are those of `RunDescription`."""
    identity: str
    params: dict[str, str]
    tags: dict[str, str]
    begins_after: int
    start: int
    reason: str
    taken_step: int = -1
    """Last step that the tracker has stored permanently."""
    samples_step: int = -1
    """Step of the newest samples that the tracker has stored permanently."""
    status: str = "RUNNING"
    """State that the run should have in the tracker."""
    settled: bool = False
    """Whether the tracker was closed with this state."""

    def description(self, folder: Path) -> RunDescription:
        """Return the description of the run."""
        about = ("name", "identity", "params", "tags", "begins_after", "start", "reason", "taken_step")
        return RunDescription(folder=folder, **{key: getattr(self, key) for key in about})


class RegisteredShipper:
    """Deliveries from a run folder to one registered tracker.

    Args:
        folder: the run folder.
        name: of the tracker.

    Raises:
        StateFileError: the state file is damaged.
        FileNotFoundError: the run was started without the tracker.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.journal = folder / "metrics.jsonl"
        self._folder, self._name = folder, name
        state = load_state(folder, name)
        if state is None:
            raise FileNotFoundError(f"{_state_file(folder, name)} does not exist: the run was started without {name}")
        self.state = state
        self._saving = threading.Lock()
        self._tracker: Tracker | None = None
        self._offset = 0
        """Offset in the journal before which every line is delivered, as far as this process knows."""
        self._reported = set[str]()
        """Faults of the journal's lines that were logged."""

    @property
    def place(self) -> str:
        """Name of the tracker, for messages."""
        return f"tracker {self._name}"

    def deliver(self) -> int:
        """Give the tracker what it has not taken; return the number of steps.

        After a fault, the next delivery makes another tracker, and sends it all that is not stored permanently.
        """
        count = 0
        try:
            tracker = self._opened()
            folders = self._undelivered_samples()
            line: JournalLine | None = None
            for line in self._undelivered_lines():
                folders = self._send_samples(tracker, folders, before=line.record["step"])
                numbers = {name: value for name, value in line.record.items() if name not in ("step", "time")}
                tracker.log(line.record["step"], numbers, line.record["time"])
                count += 1
                if count % STEPS_PER_FLUSH == 0:
                    self._take(tracker, line)
            if line is not None:
                self._take(tracker, line)
            self._send_samples(tracker, folders)
        except Exception:
            self._close("RUNNING")
            raise
        return count

    def _send_samples(self, tracker: Tracker, folders: Sequence[Path], before: float = math.inf) -> list[Path]:
        """Give the tracker samples of steps before one, where they have their place; return the folders of others.

        Damaged samples are a warning: numbers do not wait for them.
        """
        due = [folder for folder in folders if step_in(folder.name) < before]
        for folder in due:
            try:
                found = read_samples(folder)
            except FileNotFoundError:  # a start that repeats the step has removed them
                continue
            except StateFileError as error:
                self._report_once(f"{self.place} does not get samples: {error}")
                continue
            tracker.log_samples(found, folder)
            tracker.flush()
            self.state.samples_step = step_in(folder.name)
            self._save()
        return list(folders[len(due) :])

    def _undelivered_samples(self) -> list[Path]:
        return sample_folders(self._folder / "samples", after=self.state.samples_step)

    def finish(self) -> None:
        """Deliver, and close the tracker with the state of the run."""
        if self.state.settled and not self.undelivered() and not self._undelivered_samples():
            return
        self.deliver()
        self._close(self.state.status)
        self.state.settled = True
        self._save()

    def set_status(self, status: str) -> None:
        """Store the state of the run."""
        self.state.status, self.state.settled = status, False
        self._save()

    def undelivered(self) -> int:
        """Return the number of steps that the tracker has not taken."""
        return sum(1 for _ in self._undelivered_lines())

    def _opened(self) -> Tracker:
        if self._tracker is None:
            entry = TRACKERS.get(self._name)
            node = entry.config.model_validate(self.state.config)
            if _class_of(self._name).replaces_steps:  # it drops the samples of steps that are sent again
                self.state.samples_step = min(self.state.samples_step, self.state.taken_step)
            self._tracker = entry.build(node, self.state.description(self._folder))
        return self._tracker

    def _close(self, status: str) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        if status != "RUNNING":
            tracker.close(status)
            return
        try:
            tracker.close(status)
        except Exception as error:  # the fault that comes before it is raised
            log.debug("tracker %s did not close after a fault: %s", self._name, error)

    def _take(self, tracker: Tracker, last: JournalLine) -> None:
        tracker.flush()
        self.state.taken_step = last.record["step"]
        self._save()
        self._offset = last.end

    def _undelivered_lines(self) -> Iterator[JournalLine]:
        for line in lines(self.journal, self._offset, self._report_once):
            if line.record["step"] > self.state.taken_step:
                yield line

    def _report_once(self, fault: str) -> None:
        if fault not in self._reported:
            self._reported.add(fault)
            log.warning("%s", fault)

    def _save(self) -> None:
        with self._saving:  # the loop's thread and the outbox's both write the file
            replace_file(_state_file(self._folder, self._name), json.dumps(asdict(self.state), indent=1))


def open_registered(name: str, node: BaseModel, description: RunDescription, may_write: Callable[[], bool]) -> Outbox:
    """Return the outbox of a tracker for a start of a run, whose state file it writes.

    Steps after the checkpoint of the start are sent again, if the tracker can replace them.
    """
    folder = description.folder
    try:
        before = load_state(folder, name)
    except StateFileError as error:
        log.warning("%s; this start does so", error)
        before = None
    taken, samples = -1, -1
    if before is not None and before.identity == description.identity:
        replaces = _class_of(name).replaces_steps
        taken = min(before.taken_step, description.begins_after) if replaces else before.taken_step
        samples = min(before.samples_step, taken) if replaces else before.samples_step
    state = TrackerState(
        tracker=name,
        config=node.model_dump(mode="json"),
        name=description.name,
        identity=description.identity,
        params=_as_text(description.params),
        tags=_as_text(description.tags),
        begins_after=description.begins_after,
        start=description.start,
        reason=description.reason,
        taken_step=taken,
        samples_step=samples,
    )
    path = _state_file(folder, name)
    path.parent.mkdir(exist_ok=True)
    replace_file(path, json.dumps(asdict(state), indent=1))
    return Outbox(RegisteredShipper(folder, name), may_write)


def registered_in(folder: Path) -> list[str]:
    """Return the names of the trackers that a run was started with."""
    return sorted(path.stem for path in (folder / FOLDER).glob("*.json"))


def load_state(folder: Path, name: str) -> TrackerState | None:
    """Return the state of the deliveries of a run to a tracker; None if there is none.

    Raises:
        StateFileError: the file cannot be read, or is damaged.
    """
    return read_json(_state_file(folder, name), TrackerState, "start the run with its recipe again, which writes it")


def _class_of(name: str) -> type[Tracker]:
    build = TRACKERS.get(name).build
    return build if isinstance(build, type) else Tracker


def _state_file(folder: Path, name: str) -> Path:
    return folder / FOLDER / f"{name}.json"


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in values.items()}
