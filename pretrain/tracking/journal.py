"""The journal of a run: metrics.jsonl, one JSON object a line, each with `step` and `time` (seconds since 1970)."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from byteloom.core.storage.files import replace_file, sync
from byteloom.core.storage.state_files import read_lines

log = logging.getLogger(__name__)


class Journal:
    """Writer of metrics.jsonl."""

    def __init__(self, path: Path, last_step: int | None) -> None:
        """Open the journal to continue after a step; drop the lines of later steps.

        Args:
            path: of metrics.jsonl.
            last_step: step of the checkpoint that the run resumes from; None starts an empty journal.
        """
        self.path = path
        kept = [] if last_step is None else _kept_lines(path, last_step)
        self.last_step: int = kept[-1].record["step"] if kept else -1
        """Last step in the journal when it was opened; -1 if it was empty."""
        replace_file(path, "".join(line.text for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the line of a step."""
        self._file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Put all lines on disk."""
        sync(self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class JournalLine(NamedTuple):
    """Whole line of the journal."""

    record: dict[str, Any]
    """Step, time and metrics."""
    text: str
    """The line, with its end."""
    end: int
    """Offset in the file just after the line."""


class JournalRecord(BaseModel, frozen=True, extra="allow"):
    """Numbers of one line of a journal; all but these two are metrics."""

    step: int
    """Optimizer steps done."""
    time: float
    """Seconds since 1970."""
    __pydantic_extra__: dict[str, float] = Field(init=False)


def read_journal(path: Path, report: Callable[[str], None] = log.warning, offset: int = 0) -> list[dict[str, Any]]:
    """Return the records of a journal, oldest first. Arguments and errors are those of `lines`."""
    return [line.record for line in lines(path, offset, report)]


def lines(path: Path, offset: int = 0, report: Callable[[str], None] = log.warning) -> Iterator[JournalLine]:
    """Yield the whole lines from an offset on; skip a last line that has no end, since it is being written.

    Args:
        path: of metrics.jsonl.
        offset: bytes to skip.
        report: called with the fault of each damaged line, which is skipped.

    Raises:
        StateFileError: the file cannot be read.
    """
    for line in read_lines(path, JournalRecord, offset):
        if line.fault:
            report(line.fault)
        if line.value is not None:
            yield JournalLine(line.value.model_dump(), f"{line.text}\n", line.end)


def _kept_lines(path: Path, last_step: int) -> list[JournalLine]:
    """Return the journal's lines up to a step.

    A checkpoint is written after the numbers up to its step are on disk. A loss of power therefore damages only later
    lines, which are computed again. A journal with other damage is copied before the damaged lines are dropped, because
    a person may want them; training reads no numbers from it.
    """
    faults: list[str] = []
    kept = [line for line in lines(path, report=faults.append) if line.record["step"] <= last_step]
    if faults:
        copy = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, copy)
        for fault in faults:
            log.warning("%s", fault)
        log.warning("the journal continues without them; %s is a copy with them", copy)
    return kept
