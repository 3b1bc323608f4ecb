"""Data of a checkpoint: each byte is written or read once, and hashed on the way.

    save    staged ranges ─┬▶ file, in pieces
                           └▶ digests of blocks, in another thread
    load    windows of blocks ─▶ scratch ─▶ digests equal? ─▶ the reader's buffer ─▶ live tensors

Live tensors change only after all blocks were verified. If ranks load together, all of them must have verified theirs.
"""

import contextlib
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from byteloom.core.locations import Location, locate
from byteloom.core.progress import Progress, Tally, ignore
from byteloom.core.step_folders import MARKER
from pretrain.checkpoint.errors import CheckpointError, InvalidCheckpointError
from pretrain.checkpoint.folder import FolderHome
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
    plan_reads,
)
from pretrain.checkpoint.home import Home, open_home
from pretrain.distributed.fragments import Fragment

WINDOW_BYTES = 16 * BLOCK_BYTES
"""Bytes of one write, and of the largest read."""
COPY_ELEMENTS = 4 << 20
"""Elements that a thread copies at a time."""


def write_file(home: Home, path: str, content: memoryview) -> tuple[str, ...]:
    """Write a file, which is durable when this returns; return the digests of its blocks."""
    with home.create(path) as file, ThreadPoolExecutor(1) as hasher:
        digests = hasher.submit(digests_of, content)
        for begin in range(0, len(content), WINDOW_BYTES):
            file.write(content[begin : begin + WINDOW_BYTES])
        return digests.result()


def bytes_of(values: Tensor) -> memoryview:
    """Return the bytes of a flat fp32 tensor in host memory, as little-endian values."""
    return values.numpy().astype(ELEMENT, copy=False).view(np.uint8).data


def read_metadata(path: str | Location) -> Metadata:
    """Return the metadata of the checkpoint at a path or URL, checked against its digests. The data is not read.

    Raises:
        InvalidCheckpointError: it is missing or damaged.
        CheckpointError: it cannot be read, or has another format.
    """
    place = locate(path)
    return metadata_in(open_home(place.parent), place.name)


def metadata_in(home: Home, name: str) -> Metadata:
    """Return the metadata of a checkpoint, by its home and name. Raise as `read_metadata` does."""
    place = home.location / name
    with _checkpoint_errors(place / MARKER):
        stored = decode_metadata(home.read(f"{name}/{MARKER}"), place / MARKER)
    layout = file_from(stored["layout"])
    with _checkpoint_errors(place / layout.name):
        content = home.read(f"{name}/{layout.name}")
    if digests_of(memoryview(content)) != layout.digests:
        raise InvalidCheckpointError(f"{place / layout.name} is damaged")
    files = tuple(file_from(file) for file in stored["files"])
    return Metadata(home, name, stored["written"], files, decode_layout(content), stored["state"])


def metadata_of_files(
    folder: Path, files: Sequence[str], tensors: dict[str, StoredTensor], state: dict[str, Any]
) -> Metadata:
    """Return metadata for a folder that is not a checkpoint, so that its tensors can be read as those of one.

    Args:
        folder: the folder.
        files: names of its files, whose digests are computed now.
        tensors: the ranges of files that make up each tensor.
        state: state of the run.
    """
    home = FolderHome(folder.parent)
    stored = []
    for file in files:
        content = home.read(f"{folder.name}/{file}")
        stored.append(StoredFile(file, len(content), digests_of(memoryview(content))))
    return Metadata(home, folder.name, "", tuple(stored), tensors, state)


def verify(path: str | Location, part: int = 0, parts: int = 1, progress: Progress = ignore) -> Metadata:
    """Check a checkpoint, or one part of it, against its digests; return its metadata.

    Args:
        path: path or URL of the checkpoint.
        part: number of the part to verify, from 0.
        parts: number of parts.
        progress: called with bytes verified and bytes in all, of this part.

    Raises:
        InvalidCheckpointError: it is damaged or incomplete.
        CheckpointError: it cannot be read.
    """
    metadata = read_metadata(path)
    verify_data(metadata, part, parts, progress)
    return metadata


def verify_data(metadata: Metadata, part: int = 0, parts: int = 1, progress: Progress = ignore) -> None:
    """Check data as `verify` does, for metadata that has been read."""
    windows = [
        BlockWindow(file, begin // BLOCK_BYTES, blocks_of(min(begin + WINDOW_BYTES, stored.bytes)), [])
        for file, stored in enumerate(metadata.files)
        for begin in range(0, stored.bytes, WINDOW_BYTES)
    ]
    _check_sizes(metadata, range(part, len(metadata.files), parts))
    _read_windows(metadata, windows[part::parts], np.empty(0, np.uint8), progress)


def read(metadata: Metadata, fragments: Sequence[Fragment], progress: Progress = ignore) -> None:
    """Fill live fragments from a checkpoint, after all that they need was verified.

    The fragments may be other ranges than those in which the checkpoint was written.

    Args:
        metadata: of the checkpoint.
        fragments: what to fill.
        progress: called with bytes read and bytes in all.

    Raises:
        InvalidCheckpointError: a part that they need is damaged; no fragment was changed.
        CheckpointError: the checkpoint is of another model or optimizer, or cannot be read; no fragment was changed.
    """
    values = host_buffer(sum(len(fragment.data) for fragment in fragments))
    read_verified(metadata, fragments, values, progress)
    fill(fragments, values)


def read_verified(
    metadata: Metadata, fragments: Sequence[Fragment], values: Tensor, progress: Progress = ignore
) -> None:
    """Read the values of fragments into a buffer, one after another, and verify them. Raise as `read` does."""
    ranges = plan_reads(metadata, fragments)
    _check_sizes(metadata, {each.file for each in ranges})
    _read_windows(metadata, windows_of(ranges), values.numpy().view(np.uint8), progress)


def fill(fragments: Sequence[Fragment], values: Tensor) -> None:
    """Copy the values that `read_verified` read into the fragments."""
    own = torch.from_numpy(values.numpy().view(ELEMENT).astype(np.float32, copy=False))
    copy([fragment.data for fragment in fragments], own.split([len(fragment.data) for fragment in fragments]))


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy flat tensors to others: in a few threads in host memory, on a stream of its own on a GPU."""
    here: list[tuple[Tensor, Tensor]] = []
    streams: dict[torch.device, torch.cuda.Stream] = {}
    for target, source in zip(targets, sources, strict=True):
        device = target.device if target.is_cuda else source.device
        if device.type != "cuda":
            here += zip(target.split(COPY_ELEMENTS), source.split(COPY_ELEMENTS), strict=True)
            continue
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
            streams[device].wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(streams[device]):
            target.copy_(source, non_blocking=True)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda part: np.copyto(part[0].numpy(), part[1].numpy()), here):
            pass
    for stream in streams.values():
        stream.synchronize()


def host_buffer(length: int) -> Tensor:
    """Return a buffer of fp32 values in huge pages, which the kernel allocates in less than half the time."""
    if not length:
        return torch.empty(0)
    pages = mmap.mmap(-1, 4 * length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # the kernel has no huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32)


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
            if last and last.offset + last.length == offset and last.target + last.length == target:
                of_window[-1] = last._replace(length=last.length + taken)
            else:
                of_window.append(ReadRange(file, offset, taken, target))
            offset, length, target = offset + taken, length - taken, target + taken
    return [
        BlockWindow(file, parts[0].offset // BLOCK_BYTES, blocks_of(max(p.offset + p.length for p in parts)), parts)
        for (file, _), parts in wanted.items()
    ]


def _read_windows(metadata: Metadata, windows: Sequence[BlockWindow], target: np.ndarray, progress: Progress) -> None:
    """Read windows in several threads, verify them, and copy the ranges that are needed.

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
            buffer = target[ranges[0].target : ranges[0].target + length]
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
        if not whole:
            for each in ranges:
                place = each.offset - offset
                target[each.target : each.target + each.length] = buffer[place : place + each.length]
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


def _check_sizes(metadata: Metadata, files: Iterable[int]) -> None:
    for stored in (metadata.files[file] for file in files):
        path = metadata.folder / stored.name
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
