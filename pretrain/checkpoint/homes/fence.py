"""The fence: only the newest start of a run writes.

Each start takes the next generation of its run folder, and of the home of its checkpoints if that is elsewhere. When a
node that was cut off comes back, while the job runs elsewhere, its processes find a newer generation there and end. A
lock does not help: it is local to one machine, or is lost with the connection.
"""

import logging
import re
import time
import uuid
from pathlib import Path
from typing import NoReturn

from byteloom.core.errors import CorrectableError
from byteloom.core.storage.files import create_file, replace_file
from byteloom.core.storage.locations import Location, Url
from byteloom.core.storage.state_files import StateFileError
from pretrain.checkpoint.homes.bucket import BucketHome

log = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds between two checks of a rank that writes nothing."""


class FencedError(CorrectableError):
    """A newer start of the run has taken over."""


class Note:
    """A small text at a place. Reading and replacing raise OSError; bytes that are not UTF-8 are read as U+FFFD."""

    def __init__(self, place: Location) -> None:
        self.place = place
        self._bucket = BucketHome(place.parent) if isinstance(place, Url) else None

    def read(self) -> str | None:
        """Return the text; None if there is none."""
        try:
            if isinstance(self.place, Path):
                return self.place.read_text(encoding="utf-8", errors="replace")
            assert self._bucket is not None
            return self._bucket.read(self.place.name).decode(errors="replace")
        except FileNotFoundError:
            return None

    def create(self, text: str) -> bool:
        """Write the text if there is none; return whether there was none."""
        try:
            if isinstance(self.place, Path):
                self.place.parent.mkdir(parents=True, exist_ok=True)
                create_file(self.place, text)
            else:
                assert self._bucket is not None
                self._bucket.create_once(self.place.name, text.encode())
        except OSError:  # a server has its own error for an object that exists
            if self.read() is None:
                raise
            return False
        return True

    def replace(self, text: str) -> None:
        """Write the text; readers find the old text or the new one."""
        if isinstance(self.place, Path):
            self.place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.place, text)
        else:
            assert self._bucket is not None
            self._bucket.replace(self.place.name, text.encode())


class Fence:
    """Mark of a start (its generation and a random word) in notes that all starts of the run see.

    Without a mark, every check passes.

    Args:
        near: note in the run folder; it is read often.
        *far: notes elsewhere, because another start may have another run folder.
    """

    def __init__(self, near: Location, *far: Location) -> None:
        self._near, self._far = Note(near), [Note(place) for place in far]
        self.mark: str | None = None
        """Mark of this start, the same on all ranks."""
        self._looked = float("-inf")

    @property
    def generation(self) -> int | None:
        """Number of this start; None without a mark."""
        return None if self.mark is None else _generation_in(self.mark)

    def claim(self, after: int = 0) -> str:
        """Take the next generation, and return its mark. The first rank calls this once it holds the run folder.

        Args:
            after: generation of the newest checkpoint, which counts if a note is lost.

        If two starts do so at the same time, the one that writes last has it. A damaged note is replaced: a start
        writes only if it finds its own mark, with its own random word, so an older start cannot continue to write.

        Raises:
            FencedError: a note cannot be written.
        """
        notes = (*self._far, self._near)
        try:
            mark = f"{1 + max(after, *(_counted_in(note) for note in notes))} {uuid.uuid4().hex}"
            for note in notes:
                note.replace(f"{mark}\n")
        except OSError as error:
            places = " and ".join(str(note.place) for note in notes)
            raise FencedError(f"this start cannot be noted at {places}: {error.strerror or error}") from error
        return mark

    @property
    def holds(self) -> bool:
        """Whether this start is the newest by the note in the run folder; False if the note cannot be read."""
        self._looked = time.monotonic()
        try:
            return self.mark is None or _mark_in(self._near) == self.mark
        except OSError:
            return False

    def check(self) -> None:
        """Check that this start may write to the run folder.

        Raises:
            FencedError: this start is no longer the newest.
        """
        if not self.holds:
            self._refuse(self._near)

    def check_everywhere(self) -> None:
        """Check that this start may write a checkpoint. Raises as `check`."""
        self.check()
        for note in self._far:
            if self.mark is not None and _mark_in(note) != self.mark:
                self._refuse(note)

    def look(self) -> None:
        """Check as `check` does, if the last check is older than PAUSE."""
        if time.monotonic() - self._looked > PAUSE:
            self.check()

    def _refuse(self, note: Note) -> NoReturn:
        """Raise FencedError with the reason why this start may not write, from the content of a note."""
        text, place = note.read(), note.place
        if text is None and isinstance(place, Path) and not place.parent.exists():
            raise FencedError(
                f"the run folder {place.parent} was removed or renamed while the run trained in it; nothing more is "
                "written, and a new start continues from the checkpoints that are left"
            )
        why = "was removed while the run trained" if text is None else "is damaged"
        if text is None or (generation := _generation_in(text)) is None:
            raise FencedError(
                f"{place} {why}: this start cannot know whether a newer one has taken over, so it writes nothing more; "
                "the same command continues from the newest checkpoint"
            )
        raise FencedError(
            f"start {generation} of this run has taken over from this one, start "
            f"{_generation_in(self.mark or '')}, which writes nothing more"
        )


def starts_noted_at(place: Location) -> int:
    """Return how often a run has been started.

    Raises:
        StateFileError: the note is damaged.
    """
    return _starts_noted_in(Note(place))


def _starts_noted_in(note: Note) -> int:
    text = note.read()
    if text is None:
        return 0
    generation = _generation_in(text)
    if generation is None:
        fault = "it does not hold a start's mark" if text.strip("\0") else "it is empty or holds only zero bytes"
        raise StateFileError.damaged(note.place, fault, "the next start of the run writes it again")
    return generation


def _counted_in(note: Note) -> int:
    """Return how often a run has been started; 0 if the note is damaged."""
    try:
        return _starts_noted_in(note)
    except StateFileError as error:
        log.warning("%s; this start does so, and counts on from the newest checkpoint", error)
        return 0


def _mark_in(note: Note) -> str | None:
    text = note.read()
    return None if text is None else text.rstrip("\n")


def _generation_in(text: str) -> int | None:
    """Return the generation of a mark; None if the mark is damaged."""
    found = re.match(r"([0-9]{1,9})(?: [0-9a-f]+)?\n?$", text)
    return int(found[1]) if found else None
