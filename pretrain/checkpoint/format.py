"""What is in a checkpoint: flat ranges of fp32 tensors by name, told in JSON. docs/checkpoints.md specifies it.

    rank-00000.bin     the ranges one rank owned, back to back, little-endian fp32
    layout.json        of every tensor its shape, and the ranges of files that make it up
    metadata.json      the files and the digests of their blocks; the run's state; a digest of itself

No engine, no world size and no pickle is in it: whoever reads asks for the ranges it needs. Here nothing is read or
written; data.py does that, and home.py knows where.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

import blake3
import numpy as np

from pretrain.checkpoint.errors import CheckpointError, InvalidCheckpointError
from pretrain.checkpoint.home import Home, Location
from pretrain.fragments import Fragment

FORMAT = "byteloom-checkpoint/2"
ELEMENT = np.dtype("<f4")
BLOCK_BYTES = 1 << 20
"""What has a digest of its own: a reader of a small range reads little more than that."""
LAYOUT = "layout.json"


@dataclass(frozen=True, eq=False)
class StoredTensor:
    shape: tuple[int, ...]
    ranges: np.ndarray
    """(n, 3) int64: number of the file, offset in bytes, length in elements; in the order of the flattened tensor,
    which they make up."""

    @cached_property
    def ends(self) -> np.ndarray:
        """(n,) where each range ends in the flattened tensor."""
        return np.cumsum(self.ranges[:, 2])


class StoredFile(NamedTuple):
    name: str
    bytes: int
    digests: tuple[str, ...]
    """Of its blocks: BLAKE3, in hexadecimal."""


@dataclass(frozen=True, eq=False)
class Metadata:
    home: Home
    name: str
    written: str
    """When, in ISO format."""
    files: tuple[StoredFile, ...]
    tensors: dict[str, StoredTensor]
    state: dict[str, Any]
    """What the run needs beside tensors to go on; JSON."""

    @property
    def folder(self) -> Location:
        """Where it lies."""
        return self.home.location / self.name


class OwnedRange(NamedTuple):
    """What a rank tells of one of its fragments; JSON."""

    name: str
    shape: Sequence[int]
    start: int
    length: int


def owned_ranges(fragments: Iterable[Fragment]) -> list[OwnedRange]:
    """A rank's part of the layout: what is in its file, in that order."""
    return [OwnedRange(f.name, f.shape, f.start, len(f.data)) for f in fragments]


def encode_layout(of_ranks: Sequence[Sequence[Sequence[Any]]]) -> bytes:
    """layout.json of what ranks own.

    Args:
        of_ranks: each one's OwnedRanges.
    Raises:
        CheckpointError: they do not make up every tensor, each element once.
    """
    tensors: dict[str, tuple[Sequence[int], list[tuple[int, int, int, int]]]] = {}
    for file, owned in enumerate(of_ranks):
        offset = 0
        for name, shape, start, length in owned:
            _, ranges = tensors.setdefault(name, (shape, []))
            if length:
                ranges.append((start, file, offset, length))
                offset += length * ELEMENT.itemsize
    layout = {}
    for name, (shape, ranges) in tensors.items():
        ranges.sort()
        end = 0
        for start, _, _, length in ranges:
            if start != end:
                raise CheckpointError(
                    f"element {min(start, end)} of {name} is owned by {'two' if start < end else 'no'} ranks"
                )
            end += length
        if end != math.prod(shape):
            raise CheckpointError(f"element {end} of {name} is owned by no rank")
        layout[name] = {"shape": shape, "dtype": "float32", "ranges": [found[1:] for found in ranges]}
    return json.dumps(layout, separators=(",", ":")).encode()


def decode_layout(content: bytes) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(tuple(stored["shape"]), np.array(stored["ranges"], np.int64).reshape(-1, 3))
        for name, stored in json.loads(content).items()
    }


def encode_metadata(files: Sequence[StoredFile], layout: StoredFile, state: dict[str, Any]) -> bytes:
    """metadata.json."""
    metadata = {
        "format": FORMAT,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "block_bytes": BLOCK_BYTES,
        "files": [file._asdict() for file in files],
        "layout": layout._asdict(),
        "state": state,
    }
    return json.dumps(metadata | {"blake3": digest_of(_canonical(metadata))}, indent=1).encode()


def decode_metadata(content: bytes, path: Location) -> dict[str, Any]:
    """metadata.json, checked against its own digest.

    Raises:
        InvalidCheckpointError: it is damaged.
        CheckpointError: it has another format.
    """
    try:
        metadata = json.loads(content)
    except ValueError as error:
        raise InvalidCheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(metadata, dict):
        raise InvalidCheckpointError(f"{path} is damaged: it is no JSON object")
    told = metadata.pop("blake3", None)
    if "sha256" in metadata:  # format 1, which had no blake3
        raise CheckpointError(f"{path} has format {metadata.get('format')!r}; this version reads {FORMAT!r}")
    if told != digest_of(_canonical(metadata)):
        raise InvalidCheckpointError(f"{path} is damaged: it does not have the digest it was written with")
    if metadata["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {metadata['format']!r}; this version reads {FORMAT!r}")
    return metadata


def file_from(told: dict[str, Any]) -> StoredFile:
    return StoredFile(told["name"], told["bytes"], tuple(told["digests"]))


def digest_of(content: Any) -> str:
    """Of bytes or a buffer of them."""
    return blake3.blake3(content).hexdigest()


def _canonical(metadata: dict[str, Any]) -> bytes:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()


class Piece(NamedTuple):
    """Bytes to be read from a file, and where in the reader's buffer they go."""

    file: int
    offset: int
    length: int
    target: int


def plan_reads(metadata: Metadata, fragments: Sequence[Fragment]) -> list[Piece]:
    """Where to find the values of fragments, which lie one after another in a buffer; by file and offset.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer.
    """
    pieces = []
    target = 0
    for fragment in fragments:
        stored = _tensor_of(metadata, fragment)
        end = fragment.start + len(fragment.data)
        place = fragment.start
        number = int(np.searchsorted(stored.ends, place, side="right"))
        while place < end:
            file, offset, length = stored.ranges[number].tolist()
            begin = int(stored.ends[number]) - length
            taken = min(end, begin + length) - place
            offset += (place - begin) * ELEMENT.itemsize
            pieces.append(Piece(file, offset, taken * ELEMENT.itemsize, target))
            place += taken
            target += taken * ELEMENT.itemsize
            number += 1
    return sorted(pieces)


def _tensor_of(metadata: Metadata, fragment: Fragment) -> StoredTensor:
    stored = metadata.tensors.get(fragment.name)
    if stored is None:
        kind, _, parameter = fragment.name.partition("/")
        if f"model/{parameter}" in metadata.tensors:
            raise CheckpointError(
                f"{metadata.folder} is of another optimizer: it has no {kind} of parameter {parameter}"
            )
        raise CheckpointError(f"{metadata.folder} is of another model: it has no tensor {fragment.name}")
    if stored.shape != fragment.shape:
        raise CheckpointError(
            f"{metadata.folder} is of another model: {fragment.name} has shape {list(stored.shape)} there "
            f"and {list(fragment.shape)} here"
        )
    return stored
