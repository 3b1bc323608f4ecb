"""The content of a checkpoint: flat ranges of fp32 tensors by name (docs/specifications/checkpoints.md).

    rank-00000.bin     the ranges one rank owned, back to back, little-endian fp32
    layout.json        of every tensor its shape, and the ranges of files that make it up
    metadata.json      the files and the digests of their blocks; the run's state; a digest of itself

No engine, no world size and no pickle is in it: whoever reads asks for the ranges it needs. Here nothing is read or
written; data.py does that, and home.py knows where.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple, TypedDict

import blake3
import numpy as np

from byteloom.core.locations import Location
from pretrain.checkpoint.errors import CheckpointError, InvalidCheckpointError
from pretrain.checkpoint.home import Home
from pretrain.distributed.fragments import MODEL, Fragment, fragment_name, split_name

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


class Owned(TypedDict):
    """What is in a rank's file, in that order, in columns: JSON that is soon read where there are many ranks."""

    tensors: list[str]
    """Shape and name, as in "7x5 model/a"."""
    starts: list[int]
    """Of each range in the flattened tensor."""
    lengths: list[int]
    """In elements."""


def owned_ranges(fragments: Sequence[Fragment]) -> Owned:
    """A rank's part of the layout."""
    return Owned(
        tensors=[f"{'x'.join(map(str, fragment.shape))} {fragment.name}" for fragment in fragments],
        starts=[fragment.start for fragment in fragments],
        lengths=[len(fragment.data) for fragment in fragments],
    )


def encode_layout(of_ranks: Sequence[Owned]) -> bytes:
    """layout.json of what ranks own.

    Raises:
        CheckpointError: they do not make up every tensor, each element once.
    """
    numbers: dict[str, int] = {}
    columns = []
    for file, owned in enumerate(of_ranks):
        of_rank = [numbers.setdefault(tensor, len(numbers)) for tensor in owned["tensors"]]
        lengths = np.array(owned["lengths"], np.int64)
        offsets = (np.cumsum(lengths) - lengths) * ELEMENT.itemsize
        columns.append(np.array([of_rank, owned["starts"], np.full(len(lengths), file), offsets, lengths], np.int64))
    table = np.concatenate(columns, 1)
    table = table[:, table[4] > 0]
    table = table[:, np.lexsort((table[1], table[0]))]
    bounds = np.searchsorted(table[0], np.arange(len(numbers) + 1))
    layout = {}
    for tensor, begin, end in zip(numbers, bounds[:-1], bounds[1:], strict=True):
        shape_text, _, name = tensor.partition(" ")
        shape = [int(size) for size in shape_text.split("x") if size]
        _, starts, files, offsets, lengths = table[:, begin:end]
        _check_once(name, math.prod(shape), starts, starts + lengths)
        ranges = {"files": files.tolist(), "offsets": offsets.tolist(), "lengths": lengths.tolist()}
        layout[name] = {"shape": shape, "dtype": "float32", **ranges}
    return json.dumps(layout, separators=(",", ":")).encode()


def _check_once(name: str, length: int, starts: np.ndarray, ends: np.ndarray) -> None:
    """Raises CheckpointError if ranges, sorted, do not make up a tensor of so many elements."""
    expected = np.concatenate(([0], ends))
    found = np.concatenate((starts, [length]))
    if wrong := np.flatnonzero(expected != found).tolist():
        start, end = found[wrong[0]], expected[wrong[0]]
        ranks = "two ranks" if start < end else "no rank"
        raise CheckpointError(f"element {min(start, end)} of {name} is owned by {ranks}")


def decode_layout(content: bytes) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(
            tuple(stored["shape"]),
            np.array([stored["files"], stored["offsets"], stored["lengths"]], np.int64).T,
        )
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
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(metadata, dict):
        raise InvalidCheckpointError(f"{path} is damaged: it is not a JSON object")
    told = metadata.pop("blake3", None)
    if "sha256" in metadata:  # format 1, which had no blake3
        raise CheckpointError(f"{path} has format {metadata.get('format')!r}; this version reads {FORMAT!r}")
    if told != digest_of(_canonical(metadata)):
        raise InvalidCheckpointError(f"{path} is damaged: its digest is not the one it was written with")
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


class ReadRange(NamedTuple):
    """Bytes to be read from a file, and where in the reader's buffer they go."""

    file: int
    offset: int
    length: int
    target: int


def plan_reads(metadata: Metadata, fragments: Sequence[Fragment]) -> list[ReadRange]:
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
            pieces.append(ReadRange(file, offset, taken * ELEMENT.itemsize, target))
            place += taken
            target += taken * ELEMENT.itemsize
            number += 1
    return sorted(pieces)


def _tensor_of(metadata: Metadata, fragment: Fragment) -> StoredTensor:
    stored = metadata.tensors.get(fragment.name)
    if stored is None:
        kind, parameter = split_name(fragment.name)
        if fragment_name(MODEL, parameter) in metadata.tensors:
            raise CheckpointError(
                f"{metadata.folder} belongs to another optimizer: it has no {kind} of parameter {parameter}"
            )
        raise CheckpointError(f"{metadata.folder} belongs to another model: it has no tensor {fragment.name}")
    if stored.shape != fragment.shape:
        raise CheckpointError(
            f"{metadata.folder} belongs to another model: its {fragment.name} has shape {list(stored.shape)}, and this "
            f"run's has {list(fragment.shape)}"
        )
    return stored
