"""The fence: only the newest start of a run writes.

Each start takes the next generation of its run folder, and of the home of its checkpoints where that is elsewhere. A
node that was cut off, whose processes live on while the job has been started elsewhere, finds a newer generation there
when it is back, and ends. A lock is no help against it: it is one machine's, or is lost with the connection.
"""

import time
import uuid
from typing import NoReturn

from pretrain.checkpoint.home import Location, Note

PAUSE = 1.0
"""Seconds between two looks of a rank that is about to write nothing."""


class FencedError(Exception):
    """A newer start of the run has taken over."""


class Fence:
    """A start's mark, its generation and a word of its own, in notes that all starts of the run see.

    It holds nobody off until it has a mark.

    Args:
        near: in the run folder; looked at often.
        far: where else the run writes, for the case that another start has another run folder.
    """

    def __init__(self, near: Location, *far: Location) -> None:
        self._near, self._far = Note(near), [Note(place) for place in far]
        self.mark: str | None = None
        """The same on all ranks of a start."""
        self._looked = float("-inf")

    def claim(self) -> str:
        """Takes the next generation: for the first rank of a start that will go on, once it holds the folder.

        Of two starts that do so at once, the one that writes last has it.

        Raises:
            FencedError: it cannot be noted.
        """
        notes = (*self._far, self._near)
        try:
            mark = f"{1 + max(_generation(note.read()) for note in notes)} {uuid.uuid4().hex}"
            for note in notes:
                note.replace(f"{mark}\n")
        except OSError as error:
            places = " and ".join(str(note.place) for note in notes)
            raise FencedError(f"this start cannot be noted at {places}: {error.strerror or error}") from error
        return mark

    @property
    def holds(self) -> bool:
        """Whether this start is the newest, as far as the run folder knows."""
        self._looked = time.monotonic()
        return self.mark is None or _mark_in(self._near) == self.mark

    def check(self) -> None:
        """Called before anything is written to the run folder.

        Raises:
            FencedError: this start is not the newest any more.
        """
        if not self.holds:
            self._refuse(self._near)

    def check_everywhere(self) -> None:
        """Called before anything of a checkpoint is written. Raises as `check`."""
        self.check()
        for note in self._far:
            if self.mark is not None and _mark_in(note) != self.mark:
                self._refuse(note)

    def look(self) -> None:
        """As `check`, now and then."""
        if time.monotonic() - self._looked > PAUSE:
            self.check()

    def _refuse(self, note: Note) -> NoReturn:
        raise FencedError(
            f"start {_generation(note.read())} of this run has taken over from this one, start "
            f"{_generation(self.mark)}, which writes nothing more"
        )


def starts_noted_at(place: Location) -> int:
    """How often a run has been started."""
    return _generation(Note(place).read())


def _mark_in(note: Note) -> str | None:
    text = note.read()
    return None if text is None else text.rstrip("\n")


def _generation(mark: str | None) -> int:
    return int(mark.split()[0]) if mark else 0
