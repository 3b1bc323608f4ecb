"""Limits: the first documents of each source, although many workers read at once.

Each unit is counted alone, in any order. The counts of the units before it decide how many of its documents the limits
let through. If these units are done and the limit is reached, the unit is not read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.preparation.plan import PrepareOptions


@dataclass(frozen=True)
class Room:
    """Documents and bytes that the limits still let through; None is no limit."""

    documents: int | None
    bytes: int | None

    def after(self, documents: int, size: int) -> bool:
        """Return whether there is room after so many documents of so many bytes."""
        full = self.documents is not None and documents >= self.documents
        return not full and (self.bytes is None or size < self.bytes)

    def bytes_after(self, size: int) -> int | None:
        """Return the bytes for which there is room after `size` bytes; None is no limit."""
        return None if self.bytes is None else self.bytes - size


class SourceLimit:
    """Limit of one source, counted unit by unit in the order of the listing."""

    def __init__(self, options: PrepareOptions) -> None:
        self._options = options
        self._documents = self._bytes = 0
        self.reached = False

    @property
    def room(self) -> Room:
        """Room after the units so far."""
        options = self._options
        if self.reached:
            return Room(0, 0)
        return Room(
            None if options.max_documents is None else options.max_documents - self._documents,
            None if options.max_bytes is None else options.max_bytes - self._bytes,
        )

    def take(self, counts: Mapping[str, Any]) -> None:
        """Count the next unit.

        Args:
            counts: content of its unit.json.
        """
        self._documents += counts["documents"]
        self._bytes += counts["bytes"]
        room = self.room
        self.reached = self.reached or counts["full"] or not room.after(0, 0)
