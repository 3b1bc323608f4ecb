"""Events of a run's health: health.jsonl in the run folder, one JSON object a line."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from byteloom.core.storage.files import replace_file
from byteloom.core.storage.state_files import read_lines

Kind = Literal["non_finite", "gradient_norm", "loss", "values"]
Action = Literal["skip", "rewind", "stop"]


class SuspectRow(BaseModel, frozen=True):
    """A row of a bad batch."""

    row: int
    """Number of the row in the global batch."""
    sequence: int
    """Number of its training sequence."""
    bits_per_byte: float | None
    """Loss of the row; null if it is not finite."""
    documents: list[str]
    """Keys of the documents that its bytes came from."""


class HealthEvent(BaseModel, frozen=True):
    """A bad batch, or values that are not finite, and the action."""

    id: str
    """Unique name of the event, by which a checkpoint knows it."""
    time: float
    """Seconds since 1970."""
    step: int
    """Number of the step whose update was not done."""
    kind: Kind
    """Finding. values: a save found weights or moments that are not finite."""
    action: Action
    text: str
    """The event as a log line."""
    bits_per_byte: float | None = None
    """Loss of the batch; null if it is not finite."""
    gradient_norm: float | None = None
    """Norm of its gradient; null if it is not finite."""
    sequences: list[tuple[int, int]] = []
    """(first, count) of the ranges of sequences that are skipped since then; for a rewind, with all earlier ranges."""
    to_step: int | None = None
    """Step of the checkpoint that the run resumes from, after a rewind or after a stop whose rewinds have not helped; 0
    is the beginning. null: the run resumes from its newest checkpoint."""
    rate_factor: float = 1.0
    """For a rewind: factor of the learning rate after `to_step`."""
    rate_until: int = 0
    """Last step with the lower learning rate."""
    rows: list[SuspectRow] = []
    """Rows of the batch with the highest loss; those whose loss is not finite come first."""

    def as_json(self) -> dict[str, Any]:
        """Return the event as JSON values."""
        return self.model_dump(mode="json")

    def is_known_to(self, state: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint was written after the event, by the checkpoint's state."""
        return any(event["id"] == self.id for event in state.get("health", {}).get("events", []))


def or_null(number: float) -> float | None:
    """Return a number; None if it is not finite, which JSON cannot hold."""
    return number if math.isfinite(number) else None


class HealthLog:
    """The file of a run's events.

    Args:
        path: of health.jsonl, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> list[HealthEvent]:
        """Return the events, oldest first. A damaged line is left out.

        Raises:
            StateFileError: the file cannot be read.
        """
        return [line.value for line in read_lines(self._path, HealthEvent) if line.value is not None]

    def append(self, event: HealthEvent) -> None:
        """Add an event, which is on disk when this returns."""
        self._write([*self.read(), event])

    def keep_until(self, state: Mapping[str, Any]) -> None:
        """Drop the skips after a checkpoint that the run takes again, and therefore decides again.

        A skip before a rewind or a stop stays, because it is the evidence for it.

        Args:
            state: of the checkpoint; empty for the beginning of the run.
        """
        events, step = self.read(), state["reading"]["step"] if state else 0
        last = max((number for number, event in enumerate(events) if event.action != "skip"), default=-1)
        kept = [
            event
            for number, event in enumerate(events)
            if number <= last or event.step <= step or event.is_known_to(state)
        ]
        if kept != events:
            self._write(kept)

    def _write(self, events: Iterable[HealthEvent]) -> None:
        replace_file(self._path, "".join(f"{event.model_dump_json()}\n" for event in events))
