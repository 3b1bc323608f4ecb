"""Limits: the first documents of a source, found by many workers at once.

Units are counted by themselves and may be done in any order; what the limits let through of a unit follows from the
counts of the units before it. A unit that finds those done and the limit reached is not read at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.preparation.plan import PrepareOptions


@dataclass(frozen=True)
class Room:
    """What the limits still let through; None is without end."""

    documents: int | None
    bytes: int | None

    def after(self, documents: int, size: int) -> bool:
        """Whether there is room after so many documents of so many bytes."""
        full = self.documents is not None and documents >= self.documents
        return not full and (self.bytes is None or size < self.bytes)

    def bytes_after(self, size: int) -> int | None:
        return None if self.bytes is None else self.bytes - size


class SourceLimit:
    """What is taken of one source, unit by unit in the order of the listing."""

    def __init__(self, options: PrepareOptions) -> None:
        self._options = options
        self._documents = self._bytes = 0
        self.reached = False

    @property
    def room(self) -> Room:
        options = self._options
        if self.reached:
            return Room(0, 0)
        return Room(
            None if options.max_documents is None else options.max_documents - self._documents,
            None if options.max_bytes is None else options.max_bytes - self._bytes,
        )

    def take(self, counts: Mapping[str, Any]) -> None:
        """Goes on by a unit.

        Args:
            counts: its unit.json.
        """
        self._documents += counts["documents"]
        self._bytes += counts["bytes"]
        room = self.room
        self.reached = self.reached or counts["full"] or not room.after(0, 0)
