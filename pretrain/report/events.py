"""Events of a run with their reasons: starts, stops, checkpoints, requeues, failures, rewinds.

train.log       starts, their changes, checkpoints, stops ┐
launches.jsonl  events of the supervisor                   ├─▶ events_of, in the order of time
health.jsonl    bad batches                                │
run.json        rollbacks                                  ┘
"""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.supervision.record import LaunchRecord
from pretrain.tracking.mlflow.delivery import Delivery
from pretrain.training.health.events import HealthLog
from pretrain.training.run_folder import Rollback, RunFolder

LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(?P<milli>\d{3}) (?P<level>[A-Z]+) (?P<text>.*)")
"""Line of train.log; see `log_to`."""
CANNOT_CONTINUE = "the run cannot continue"
"""Entry of the log with the traceback of the error that ended a start."""
SAME_START_SECONDS = 60.0
"""Time within which a start is logged after it was noted for MLflow, or before."""


@dataclass
class Event:
    """Something that happened to a run."""

    time: float
    """Seconds since 1970."""
    kind: str
    """start, stop, finish, checkpoint, error, skip, rewind, rollback, or an event of launches.jsonl."""
    reason: str


def events_of(folder: RunFolder) -> list[Event]:
    """Return the events of a run, oldest first.

    Raises:
        StateFileError: a file is damaged or cannot be read.
    """
    found = [*_of_log(folder), *_of_launches(folder.path), *_of_health(folder), *_of_rollbacks(folder)]
    return sorted(found, key=lambda event: event.time)


def newest_event(folder: RunFolder, tail_bytes: int) -> Event | None:
    """Return the newest event of a run; None if there is none.

    Args:
        folder: of the run.
        tail_bytes: bytes at the end of train.log that are read.

    Raises:
        StateFileError: a file is damaged or cannot be read.
    """
    log = folder.log_of(0)
    begin = max(0, log.stat().st_size - tail_bytes) if log.exists() else 0
    found = [*_of_log(folder, begin), *_of_launches(folder.path), *_of_health(folder), *_of_rollbacks(folder)]
    return max(found, key=lambda event: event.time, default=None)


def parameters_of(folder: RunFolder) -> int | None:
    """Return the number of parameters that the newest start logged; None if none did."""
    found = None
    for _, _, text in log_lines(folder.log_of(0)):
        if match := re.match(r"training .*: \w+, ([\d,]+) parameters", text):
            found = int(match[1].replace(",", ""))
    return found


def log_lines(path: Path, begin: int = 0) -> Iterator[tuple[float, str, str]]:
    """Yield time, level and text of each entry of a log, which may not exist. A traceback belongs to its entry.

    Times in a log have no zone; they are read as times of this machine.

    Args:
        path: of the log.
        begin: offset of the first byte to read.
    """
    if not path.exists():
        return
    entry: tuple[float, str, str] | None = None
    with path.open("rb") as file:
        file.seek(begin)
        for content in file:
            line = content.decode("utf-8", "replace")
            if match := LINE.match(line.rstrip("\n")):
                if entry is not None:
                    yield entry
                moment = time.mktime(time.strptime(match["time"], "%Y-%m-%d %H:%M:%S"))
                entry = moment + int(match["milli"]) / 1000, match["level"], match["text"]
            elif entry is not None:
                entry = (*entry[:2], f"{entry[2]}\n{line.rstrip()}")
    if entry is not None:
        yield entry


def _of_log(folder: RunFolder, begin: int = 0) -> list[Event]:
    reasons = _reasons_of_starts(folder.mlflow)
    events: list[Event] = []
    for moment, level, text in log_lines(folder.log_of(0), begin):
        if text.startswith("training "):
            near = min(reasons, key=lambda each: abs(each[0] - moment), default=(0.0, ""))
            is_same = abs(near[0] - moment) < SAME_START_SECONDS
            events.append(Event(moment, "start", near[1] if is_same else ""))
        elif match := re.match(r"resumes (after step \d+)", text):
            _add(events, "start", f"resumes {match[1]}")
        elif match := re.match(r"changed since that checkpoint: (.*)", text):
            _add(events, "start", match[1])
        elif match := re.match(r"checkpoint .*step-0*(\d+)$", text):
            events.append(Event(moment, "checkpoint", f"step {match[1]}"))
        elif match := re.match(r"(SIG[A-Z0-9]+): stopped after step (\d+)", text):
            events.append(Event(moment, "stop", f"{match[1]} after step {match[2]}"))
        elif match := re.match(r"finished at step (\d+)", text):
            events.append(Event(moment, "finish", f"step {match[1]}"))
        elif level in ("ERROR", "CRITICAL") or text.startswith(CANNOT_CONTINUE):
            events.append(Event(moment, "error", text.splitlines()[-1]))
    return events


def _add(events: Sequence[Event], kind: str, text: str) -> None:
    """Add a text to the reason of the last event, if it is of a kind."""
    if events and events[-1].kind == kind:
        events[-1].reason = "; ".join(filter(None, (events[-1].reason, text)))


def _reasons_of_starts(state: Path) -> list[tuple[float, str]]:
    """Return the time and the reason of each start that was noted for MLflow, without those that a person made."""
    delivery = Delivery.load(state)
    starts = delivery.all_starts() if delivery else []
    return [(start.time, "" if start.reason == "manual" else start.reason) for start in starts]


def _of_launches(run: Path) -> list[Event]:
    launches = LaunchRecord(run).read(lambda fault: None)
    return [
        Event(each.time, each.event.replace("_", " "), "; ".join(filter(None, (f"job {each.job}", each.reason))))
        for each in launches
        if each.event not in ("started", "finished", "stopped")  # train.log has them
    ]


def _of_health(folder: RunFolder) -> list[Event]:
    return [Event(each.time, each.action, each.text) for each in HealthLog(folder.health).read()]


def _of_rollbacks(folder: RunFolder) -> list[Event]:
    identity = folder.stored_identity() or {}
    rollbacks = [Rollback.model_validate(each) for each in identity.get("rollbacks", ())]
    return [Event(each.time, "rollback", str(each)) for each in rollbacks]
