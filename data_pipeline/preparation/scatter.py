"""Scattering: write the documents of one unit to a folder of runs, sorted by hash (see spill.py)."""

import logging
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from byteloom.core.storage.files import sync
from byteloom.core.storage.urls import is_url
from byteloom.core.text import count
from data_pipeline.errors import BadDocumentError
from data_pipeline.preparation.keys import ContainerKeys
from data_pipeline.preparation.limits import Room, SourceLimit
from data_pipeline.preparation.plan import Plan, names_in, refuse_bad
from data_pipeline.preparation.spill import UnitWriter, read_unit, unit_folder
from data_pipeline.readers import ReadOptions, document_of, documents_in, size_of
from data_pipeline.sources.roots import refuse_changed
from data_pipeline.sources.source_file import Skipped, SourceFile, skipped

EXPANSION = {
    **{".jpg": 10, ".jpeg": 10, ".webp": 15, ".png": 2},
    **{".flac": 2, ".mp3": 11, ".ogg": 11, ".opus": 14},
    **{".gz": 4, ".zst": 4, ".xz": 5, ".bz2": 4},
}
"""Approximate raw bytes for each byte of a file that is decoded: an estimate before the file is read."""
UNKNOWN_BYTES = 1 << 20
"""Estimated raw bytes of a file whose size is not known."""


logger = logging.getLogger(__name__)


class Scatter:
    """Stage that reads units. A job is a unit; it is done when its folder exists."""

    name = "scatter"

    def __init__(self, plan: Plan) -> None:
        self.sizes: list[int] = plan.units["bytes"].tolist()
        self._plan = plan
        self._limits = [SourceLimit(plan.options) for _ in plan.sources]
        self._next: list[int] = np.searchsorted(plan.units["source"], range(len(plan.sources))).tolist()

    def done(self) -> set[int]:
        """Return the jobs that are done."""
        return {int(name) for name in names_in(self._plan.folder / "units") if name.isdecimal()}

    def is_done(self, job: int) -> bool:
        """Return whether a job is done."""
        return unit_folder(self._plan.folder, job).exists()

    def do(self, job: int, folder: Path, progress: Callable[[int], None]) -> None:
        """Do a job. See `WorkStage.do`."""
        (folder / "unit").mkdir()
        scatter_unit(self._plan, job, folder / "unit", self._room(job), progress)
        target = unit_folder(self._plan.folder, job)
        try:
            (folder / "unit").rename(target)
        except OSError:
            if not self.is_done(job):
                raise
        sync(target.parent)

    def _room(self, job: int) -> Room:
        """Return the room that the limits leave for a unit, by the counts of those units before it that are done."""
        source = int(self._plan.units[job]["source"])
        limit = self._limits[source]
        if self._plan.options.limited:
            while self._next[source] < job and (counts := read_unit(self._plan.folder, self._next[source])):
                limit.take(counts)
                self._next[source] += 1
        return limit.room


def scatter_unit(plan: Plan, unit: int, folder: Path, room: Room, progress: Callable[[int], None]) -> None:
    """Write the folder of a unit.

    Args:
        plan: the plan.
        unit: number of the unit.
        folder: empty folder, which the caller renames when it is complete.
        room: room that the limits leave for the unit; reading ends there.
        progress: called with the bytes of each file that has been read.

    Raises:
        CorpusError: a document cannot be read, unless `skip_bad`.
    """
    options = plan.options
    writer = UnitWriter(folder, unit, int(plan.units[unit]["source"]), options)
    starts = list[int]()  # documents taken before each file
    full = False

    def leave_out(left_out: Skipped) -> None:
        refuse_bad(left_out, options, plan.folder)
        writer.leave_out(left_out)

    for file, contains in plan.files_of(unit):
        if not contains and not options.reads_first:
            writer.add_unread(file, estimated_bytes(file, options.reading))
            continue
        full = not room.after(writer.documents, writer.bytes)
        if full:
            break
        starts.append(writer.documents)
        try:
            if contains or not is_url(file.url):  # for a small file at a URL, this would double the requests
                refuse_changed(file)
            if contains:
                full = _scatter_container(file, plan, writer, room, leave_out)
            else:
                full = not writer.add(document_of(file, options.reading), file, room.bytes_after(writer.bytes))
        except BadDocumentError as error:
            leave_out(skipped(file.key, error))
        if full:
            break
        progress(file.size or 0)
    writer.close(full=full, starts=starts if options.limited else [])


def _scatter_container(
    file: SourceFile, plan: Plan, writer: UnitWriter, room: Room, leave_out: Callable[[Skipped], None]
) -> bool:
    """Write the documents of a container; return whether the limits let no further document through."""
    keys = ContainerKeys(file.key)
    try:
        for found in documents_in(file, plan.options.reading):
            if isinstance(found, Skipped):
                leave_out(found)
                continue
            if not room.after(writer.documents, writer.bytes):
                return True
            found.key = keys.key_of(found.key)
            try:
                if not writer.add(found, room=room.bytes_after(writer.bytes)):
                    return True
            except BadDocumentError as error:
                leave_out(skipped(found.key, error))
        refuse_changed(file)
    finally:
        if keys.renamed:
            logger.warning(
                "%s: %s with the name of an earlier one; a number was added to the key, as in %s",
                *(file.url, count(keys.renamed, "document"), keys.example),
            )
    return False


def estimated_bytes(file: SourceFile, options: ReadOptions) -> int:
    """Return an estimate of the raw bytes of a file that is one document."""
    if file.size is None:
        return UNKNOWN_BYTES
    if size_of(file, options) is not None:
        return file.size
    return file.size * EXPANSION.get(PurePosixPath(file.key).suffix.lower(), 1)
