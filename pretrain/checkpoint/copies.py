"""Copies of a checkpoint for another run: the same tensors, another state.

files of a checkpoint ─▶ windows of blocks ─▶ digests equal? ─▶ files of a draft ─▶ metadata.json with another state
"""

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from byteloom.core.progress import Progress, Tally, ignore
from byteloom.core.storage.locations import Location
from byteloom.core.storage.step_folders import step_in, step_name
from pretrain.checkpoint.data import WINDOW_BYTES, digests_of, marker_in, metadata_in, state_in
from pretrain.checkpoint.errors import CheckpointError, InvalidCheckpointError
from pretrain.checkpoint.format import (
    BLOCK_BYTES,
    ELEMENT,
    LAYOUT,
    Metadata,
    StoredFile,
    encode_metadata,
    file_from,
)
from pretrain.checkpoint.homes.home import Home, open_home
from pretrain.checkpoint.identity import fault_in_course
from pretrain.checkpoint.staging import host_buffer
from pretrain.checkpoint.values import StoredValues, refuse_not_finite


def checkpoint_of_step(place: str | Location, step: int, run: str | None) -> Metadata:
    """Return the metadata of the checkpoint of a step, which must be of a run's present course. No tensor is read.

    Args:
        place: home of the run's checkpoints.
        step: of the checkpoint.
        run: id of the run; None if it is not known.

    Raises:
        InvalidCheckpointError: its metadata is damaged, or it belongs to another run or course.
        CheckpointError: there is no such checkpoint, or it cannot be read.
    """
    home = open_home(place)
    try:
        names = home.names()
    except OSError as error:
        raise CheckpointError(f"{home.location} cannot be read: {error.strerror or error}") from error
    name = step_name(step)
    if name not in names:
        there = f"those of steps {', '.join(str(step_in(each)) for each in names)}" if names else "none"
        raise CheckpointError(f"{home.location} has no checkpoint of step {step}; it has {there}")
    if fault := fault_in_course(name, names, partial(state_in, home), run):
        raise InvalidCheckpointError(f"{home.location / name} {fault}")
    return metadata_in(home, name)


def copy_checkpoint(
    source: Metadata,
    home: Home,
    state: Mapping[str, Any],
    before_commit: Callable[[], None],
    progress: Progress = ignore,
) -> Location:
    """Copy a checkpoint to another home, with another state, and verify each byte and value on the way.

    Args:
        source: checkpoint to copy. Nothing is written where it is.
        home: home of the copy.
        state: state of the copy.
        before_commit: called when all files of the copy are on disk; what it raises prevents the commit.
        progress: called with bytes copied and bytes in all.

    Raises:
        InvalidCheckpointError: the checkpoint is damaged, or has values that are not finite.
        CheckpointError: it cannot be read, or the copy cannot be written.
    """
    try:
        draft = home.begin(source.name)
    except OSError as error:
        raise _cannot_copy(source, home, error) from error
    try:
        files = _copy_files(source, home, draft, progress)
        layout = _copy_layout(source, home, draft)
        marker = encode_metadata(files, layout, dict(state), source.not_finite)
        before_commit()
        home.commit(source.name, draft, marker)
    except BaseException as error:
        with contextlib.suppress(OSError):
            home.abandon(draft)
        if isinstance(error, OSError):
            raise _cannot_copy(source, home, error) from error
        raise
    return home.location / source.name


def _cannot_copy(source: Metadata, home: Home, error: OSError) -> CheckpointError:
    return CheckpointError(f"{source.folder} cannot be copied to {home.location}: {error.strerror or error}")


def _copy_files(source: Metadata, home: Home, draft: str, progress: Progress) -> list[StoredFile]:
    """Copy the files of tensors, several at the same time; return them with their names in the copy."""
    found = StoredValues(source.tensors)
    done = Tally(sum(file.bytes for file in source.files), progress)

    def copy_one(number: int) -> StoredFile:
        stored, name = source.files[number], f"rank-{number:05d}.bin"
        buffer = host_buffer(WINDOW_BYTES // ELEMENT.itemsize).numpy().view(np.uint8)
        with home.create(draft + name) as file:
            for begin in range(0, stored.bytes, WINDOW_BYTES):
                window = buffer[: min(WINDOW_BYTES, stored.bytes - begin)]
                _read_window(source, stored, begin, window)
                found.look(number, begin, window)
                file.write(window.data)
                done.add(len(window))
        return stored._replace(name=home.stored_name(source.name, draft, name))

    with ThreadPoolExecutor(source.home.readers) as pool:
        files = list(pool.map(copy_one, range(len(source.files))))
    refuse_not_finite(source.folder, found.counts)
    return files


def _read_window(source: Metadata, stored: StoredFile, begin: int, window: np.ndarray) -> None:
    """Fill a buffer from a file, and compare it with the digests of its blocks."""
    path = f"{source.name}/{stored.name}"
    if source.home.is_link(path):
        raise InvalidCheckpointError(f"{source.folder / stored.name} is a symbolic link, which is not followed")
    count = source.home.read_into(path, begin, window.data)
    first = begin // BLOCK_BYTES
    digests = digests_of(window.data)
    if count != len(window) or digests != stored.digests[first : first + len(digests)]:
        raise InvalidCheckpointError(
            f"{source.folder / stored.name} is damaged between bytes {begin:,} and {begin + len(window):,}"
        )


def _copy_layout(source: Metadata, home: Home, draft: str) -> StoredFile:
    """Copy the layout, which must still be the one of the metadata; return its file with its name in the copy."""
    stored = file_from(marker_in(source.home, source.name)["layout"])
    content = source.home.read(f"{source.name}/{stored.name}")
    if digests_of(memoryview(content)) != stored.digests:
        raise InvalidCheckpointError(f"{source.folder / stored.name} is damaged")
    with home.create(draft + LAYOUT) as file:
        file.write(memoryview(content))
    return stored._replace(name=home.stored_name(source.name, draft, LAYOUT))
