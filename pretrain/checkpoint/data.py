"""Data of a checkpoint: each byte is written or read once, and hashed on the way.

    save    staged ranges ─┬▶ file, in pieces
                           └▶ digests of blocks, in another thread
    load    windows of blocks ─▶ scratch ─▶ digests equal? ─▶ the reader's buffer ─▶ live tensors

Live tensors change only after all blocks were verified. If ranks load together, all of them must have verified theirs.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from byteloom.core.progress import Progress, Tally, ignore
from byteloom.core.storage.locations import Location, locate
from byteloom.core.storage.step_folders import MARKER, is_checkpoint_name
from pretrain.checkpoint.errors import CheckpointError, InvalidCheckpointError
from pretrain.checkpoint.format import (
    BLOCK_BYTES,
    ELEMENT,
    Metadata,
    ReadRange,
    StoredFile,
    StoredTensor,
    decode_layout,
    decode_metadata,
    digest_of,
    file_from,
)
from pretrain.checkpoint.homes.folder import FolderHome
from pretrain.checkpoint.homes.home import Home, open_home
from pretrain.checkpoint.identity import fault_of_place
from pretrain.checkpoint.staging import CHUNK_BYTES, bytes_in
from pretrain.checkpoint.values import StoredValues

WINDOW_BYTES = 16 * BLOCK_BYTES
"""Bytes of one write, and of the largest read."""


def write_file(home: Home, path: str, *chunks: memoryview) -> tuple[str, ...]:
    """Write a file, which is durable when this returns; return the digests of its blocks.

    Args:
        home: of the checkpoint.
        path: of the new file.
        chunks: its content. All but the last are a multiple of the blocks.
    """
    with home.create(path) as file, ThreadPoolExecutor(1) as hasher:
        digests = [hasher.submit(digests_of, chunk) for chunk in chunks]
        for chunk in chunks:
            for begin in range(0, len(chunk), WINDOW_BYTES):
                file.write(chunk[begin : begin + WINDOW_BYTES])
        return tuple(digest for of_chunk in digests for digest in of_chunk.result())


def bytes_of(values: Tensor) -> memoryview:
    """Return the bytes of a flat fp32 tensor in host memory, as little-endian values."""
    return values.numpy().astype(ELEMENT, copy=False).view(np.uint8).data


def read_metadata(path: str | Location) -> Metadata:
    """Return the metadata of the checkpoint at a path or URL, checked against its digests. The data is not read.

    Raises:
        InvalidCheckpointError: it is missing or damaged, or not what its name says.
        CheckpointError: it cannot be read, or has another format.
    """
    place = locate(path)
    return metadata_in(open_home(place.parent), place.name)


def metadata_in(home: Home, name: str) -> Metadata:
    """Return the metadata of a checkpoint, by its home and name. Raise as `read_metadata` does."""
    return metadata_from(home, name, *metadata_texts(home, name))


def metadata_texts(home: Home, name: str) -> tuple[str, str]:
    """Return metadata.json and layout.json, which agree with their digests. Raise as `read_metadata` does."""
    marker, stored = _checked_marker(home, name)
    layout, place = file_from(stored["layout"]), home.location / name
    _refuse_link(home, name, layout.name)
    with _checkpoint_errors(place / layout.name):
        content = home.read(f"{name}/{layout.name}")
    if digests_of(memoryview(content)) != layout.digests:
        raise InvalidCheckpointError(f"{place / layout.name} is damaged")
    return marker.decode(), content.decode()


def metadata_from(home: Home, name: str, marker: str, layout: str) -> Metadata:
    """Return the metadata of a checkpoint, given what `metadata_texts` returned for it, maybe on another rank."""
    stored = json.loads(marker)
    files = tuple(file_from(file) for file in stored["files"])
    return Metadata(
        home,
        name,
        stored["written"],
        files,
        decode_layout(layout),
        stored["state"],
        stored.get("not_finite"),
        f"blake3:{stored['blake3']}",
    )


def marker_in(home: Home, name: str) -> dict[str, Any]:
    """Return the content of metadata.json, by the home and name of a checkpoint. Raise as `read_metadata` does."""
    return _checked_marker(home, name)[1]


def _checked_marker(home: Home, name: str) -> tuple[bytes, dict[str, Any]]:
    """Return metadata.json, and what it says."""
    place = home.location / name
    _refuse_link(home, name)
    _refuse_link(home, name, MARKER)
    with _checkpoint_errors(place / MARKER):
        content = home.read(f"{name}/{MARKER}")
        stored = decode_metadata(content, place / MARKER)
    if fault := fault_of_place(name, stored["state"]):
        raise InvalidCheckpointError(f"{place} {fault}")
    return content, stored


def state_in(home: Home, name: str) -> dict[str, Any] | None:
    """Return the state that a checkpoint holds; None if its metadata is not valid or cannot be read."""
    try:
        state: dict[str, Any] = marker_in(home, name)["state"]
    except CheckpointError:
        return None
    return state


def _refuse_link(home: Home, name: str, *file: str) -> None:
    """Raise InvalidCheckpointError if a checkpoint, or a file of it, is a symbolic link: others may change its target.

    A person may give a link of another name to a command.
    """
    if is_checkpoint_name(name) and home.is_link("/".join((name, *file))):
        place = home.location / name
        raise InvalidCheckpointError(f"{'/'.join((str(place), *file))} is a symbolic link, which is not followed")


def metadata_of_files(
    folder: Path, files: Sequence[str], tensors: dict[str, StoredTensor], state: dict[str, Any], digest: str
) -> Metadata:
    """Return metadata for a folder that is not a checkpoint, so that its tensors can be read as those of one.

    Args:
        folder: the folder.
        files: names of its files, whose digests are computed now. All values are finite.
        tensors: the ranges of files that make up each tensor.
        state: state of the run.
        digest: see `Metadata`.
    """
    home = FolderHome(folder.parent)
    stored = []
    for file in files:
        content = home.read(f"{folder.name}/{file}")
        stored.append(StoredFile(file, len(content), digests_of(memoryview(content))))
    return Metadata(home, folder.name, "", tuple(stored), tensors, state, {}, digest)


def verify(path: str | Location, part: int = 0, parts: int = 1, progress: Progress = ignore) -> Metadata:
    """Check a checkpoint, or one part of it, against its digests, and look at its values.

    Returns its metadata. `not_finite` is what was found in this part; values that are not finite are no error here.

    Args:
        path: path or URL of the checkpoint.
        part: number of the part to verify, from 0.
        parts: number of parts.
        progress: called with bytes verified and bytes in all, of this part.

    Raises:
        InvalidCheckpointError: it is damaged or incomplete, or not what its name says.
        CheckpointError: it cannot be read.
    """
    return verify_data(read_metadata(path), part, parts, progress)


def verify_data(metadata: Metadata, part: int = 0, parts: int = 1, progress: Progress = ignore) -> Metadata:
    """Check data as `verify` does, for metadata that has been read."""
    windows = [
        BlockWindow(file, begin // BLOCK_BYTES, blocks_of(min(begin + WINDOW_BYTES, stored.bytes)), [])
        for file, stored in enumerate(metadata.files)
        for begin in range(0, stored.bytes, WINDOW_BYTES)
    ]
    check_sizes(metadata, range(part, len(metadata.files), parts))
    found = StoredValues(metadata.tensors)
    read_windows(metadata, windows[part::parts], [], progress, found)
    return replace(metadata, not_finite=found.counts)


class BlockWindow(NamedTuple):
    """Blocks of a file that are read at once, and the ranges of them that are needed."""

    file: int
    """Number of the file."""
    begin: int
    """Number of the first block."""
    end: int
    """Number of the block after the last one."""
    ranges: list[ReadRange]


def windows_of(ranges: Sequence[ReadRange]) -> list[BlockWindow]:
    """Return the windows that contain some ranges, each window of a file once."""
    wanted: dict[tuple[int, int], list[ReadRange]] = {}
    for each in ranges:
        file, offset, length, target = each
        while length:
            number = offset // WINDOW_BYTES
            taken = min(length, (number + 1) * WINDOW_BYTES - offset)
            of_window = wanted.setdefault((file, number), [])
            last = of_window[-1] if of_window else None
            follows = last and last.offset + last.length == offset and last.target + last.length == target
            if last and follows and target % CHUNK_BYTES:
                of_window[-1] = last._replace(length=last.length + taken)
            else:
                of_window.append(ReadRange(file, offset, taken, target))
            offset, length, target = offset + taken, length - taken, target + taken
    return [
        BlockWindow(file, parts[0].offset // BLOCK_BYTES, blocks_of(max(p.offset + p.length for p in parts)), parts)
        for (file, _), parts in wanted.items()
    ]


def share_starts(metadata: Metadata, parts: int) -> np.ndarray:
    """Return where each of several shares of a checkpoint's data begins, and where the last ends, at starts of blocks.

    The numbers count the bytes of all files, one after another.
    """
    ends = np.cumsum([0, *(file.bytes for file in metadata.files)])
    places = np.array([int(ends[-1]) * part // parts for part in range(parts)], np.int64)
    files = np.searchsorted(ends, places, side="right") - 1
    whole_blocks = (places - ends[files]) // BLOCK_BYTES * BLOCK_BYTES
    return np.append(ends[files] + whole_blocks, ends[-1])


def share_of(metadata: Metadata, part: int, parts: int) -> list[ReadRange]:
    """Return the ranges of a share of a checkpoint's data. Their targets follow each other, each in one chunk."""
    begin, end = share_starts(metadata, parts)[part : part + 2].tolist()
    ranges, target, file_begin = [], 0, 0
    for number, file in enumerate(metadata.files):
        offset, last = max(begin - file_begin, 0), min(end - file_begin, file.bytes)
        while offset < last:
            taken = min(last - offset, CHUNK_BYTES - target % CHUNK_BYTES)
            ranges.append(ReadRange(number, offset, taken, target))
            offset, target = offset + taken, target + taken
        file_begin += file.bytes
    return ranges


def read_windows(
    metadata: Metadata,
    windows: Sequence[BlockWindow],
    chunks: Sequence[Tensor],
    progress: Progress,
    found: StoredValues | None = None,
) -> None:
    """Read windows in several threads, verify them, and copy the ranges that are needed to staging.

    Args:
        metadata: of the checkpoint.
        windows: what to read.
        chunks: staging, where the targets of ranges are.
        progress: called with bytes read and bytes in all.
        found: looks at all values that are read, if given.

    Raises:
        InvalidCheckpointError: a window is damaged.
        CheckpointError: a file cannot be read.
    """
    own = threading.local()
    done = Tally(sum(_length_of(metadata, window) for window in windows), progress)

    def read_one(window: BlockWindow) -> None:
        file, begin, end, ranges = window
        stored = metadata.files[file]
        offset = begin * BLOCK_BYTES
        length = _length_of(metadata, window)
        whole = len(ranges) == 1 and ranges[0].offset == offset and ranges[0].length == length
        if whole:
            buffer = bytes_in(chunks, ranges[0].target, length)
        else:
            if not hasattr(own, "scratch"):
                own.scratch = np.empty(WINDOW_BYTES, np.uint8)
            buffer = own.scratch[:length]
        path = metadata.folder / stored.name
        with _checkpoint_errors(path):
            count = metadata.home.read_into(f"{metadata.name}/{stored.name}", offset, buffer.data)
        if count != length:
            raise InvalidCheckpointError(f"{path} is shorter than the file that was written")
        if digests_of(buffer.data) != stored.digests[begin:end]:
            raise InvalidCheckpointError(f"{path} is damaged between bytes {offset:,} and {offset + length:,}")
        if found is not None:
            found.look(file, offset, buffer)
        if not whole:
            for each in ranges:
                place = each.offset - offset
                bytes_in(chunks, each.target, each.length)[:] = buffer[place : place + each.length]
        done.add(length)

    with ThreadPoolExecutor(metadata.home.readers) as pool:
        try:
            for _ in pool.map(read_one, windows):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _length_of(metadata: Metadata, window: BlockWindow) -> int:
    """Return the length of a window in bytes."""
    end = min(window.end * BLOCK_BYTES, metadata.files[window.file].bytes)
    return end - window.begin * BLOCK_BYTES


def check_sizes(metadata: Metadata, files: Iterable[int]) -> None:
    """Check that files have the lengths that they were written with, and that none is a link.

    Raises:
        InvalidCheckpointError: one is missing, or is not what was written.
        CheckpointError: one cannot be read.
    """
    for stored in (metadata.files[file] for file in files):
        path = metadata.folder / stored.name
        _refuse_link(metadata.home, metadata.name, stored.name)
        with _checkpoint_errors(path):
            size = metadata.home.size(f"{metadata.name}/{stored.name}")
        if size != stored.bytes:
            longer = "longer" if size > stored.bytes else "shorter"
            raise InvalidCheckpointError(f"{path} is {longer} than the file that was written")


def digests_of(content: memoryview) -> tuple[str, ...]:
    """Return the digests of the blocks of a file's content."""
    return tuple(digest_of(content[begin : begin + BLOCK_BYTES]) for begin in range(0, len(content), BLOCK_BYTES))


def blocks_of(length: int) -> int:
    """Return the number of blocks of a file of this length."""
    return -(-length // BLOCK_BYTES)


@contextmanager
def _checkpoint_errors(path: Location) -> Iterator[None]:
    """Raise what a file system's error means for a checkpoint."""
    try:
        yield
    except FileNotFoundError as error:
        raise InvalidCheckpointError(f"{path} is missing") from error
    except OSError as error:  # a file system that does not answer has damaged nothing
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
