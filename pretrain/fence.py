"""The fence: only the newest start of a run writes.

Each start takes the next generation of its run folder. A node that was cut off, whose processes live on while the job
has been started elsewhere, finds a newer generation there when it is back, and ends. A lock is no help against it: it
is one machine's, or is lost with the connection.
"""

import time
from pathlib import Path

from data_pipeline.atomic import replace_file

PAUSE = 1.0
"""Seconds between two looks of a rank that is about to write nothing."""


class FencedError(Exception):
    """A newer start of the run has taken over."""


class Fence:
    """A start's generation, in a file of the run folder. It holds nobody off until it has one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.generation: int | None = None
        """The same on all ranks of a start."""
        self._looked = float("-inf")

    def claim(self) -> int:
        """Takes the next generation: for the first rank of a start that will go on, once it holds the folder."""
        generation = self._newest() + 1 if self._path.exists() else 1
        replace_file(self._path, f"{generation}\n")
        return generation

    @property
    def holds(self) -> bool:
        """Whether this start is the newest."""
        self._looked = time.monotonic()
        return self.generation is None or self._newest() == self.generation

    def check(self) -> None:
        """Called before anything is written.

        Raises:
            FencedError: this start is not the newest any more.
        """
        if not self.holds:
            raise FencedError(
                f"start {self._newest()} of this run has taken over from this one, start {self.generation}, which "
                "writes nothing more"
            )

    def look(self) -> None:
        """As `check`, now and then."""
        if time.monotonic() - self._looked > PAUSE:
            self.check()

    def _newest(self) -> int:
        return int(self._path.read_text(encoding="utf-8"))
