"""The content of a checkpoint: flat ranges of fp32 tensors by name (docs/specifications/checkpoints.md).

    rank-00000.bin     the ranges one rank owned, back to back, little-endian fp32
    layout.json        the shape of every tensor, and the ranges of files that make it up
    metadata.json      the files and the digests of their blocks; the run's state; the count of values that are not
                       finite; a digest of itself

This module encodes and decodes; data.py reads and writes the files, in a home that homes/home.py describes.

Why not torch.distributed.checkpoint (DCP) or safetensors:
- ZeRO owns flat ranges of tensors. A safetensors file holds whole tensors. DCP plans N-dimensional boxes, of which a
  flat range takes up to 2N - 1; flat ranges need only a sort.
- Every block has a digest, which is compared before a live tensor changes. Neither format has digests, and DCP loads
  into live tensors as it reads.
- It contains no pickle, so a checkpoint from elsewhere runs no code. DCP's metadata is a pickle.
- It does not depend on the version of torch.
Exports for other programs are safetensors.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

import blake3
import numpy as np

from byteloom.core.storage.locations import Location
from pretrain.checkpoint.errors import CheckpointError, InvalidCheckpointError
from pretrain.checkpoint.homes.home import Home
from pretrain.distributed.fragments import MODEL, Fragment, fragment_name, split_name

FORMAT = "byteloom-checkpoint/4"
EARLIER_FORMATS = ("byteloom-checkpoint/2", "byteloom-checkpoint/3")
"""Formats that are read too. Format 2 does not say whether the values are finite. Neither knows skipped sequences."""
ELEMENT = np.dtype("<f4")
BLOCK_BYTES = 1 << 20
"""Length of the blocks that have a digest each. It is about the least that a reader of a small range reads."""
LAYOUT = "layout.json"


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in the files of a checkpoint."""

    shape: tuple[int, ...]
    ranges: np.ndarray
    """(n, 3) int64: number of the file, offset in bytes, length in elements. The ranges, in this order, make up the
    flattened tensor."""

    @cached_property
    def ends(self) -> np.ndarray:
        """(n,) int64: end of each range in the flattened tensor, in elements."""
        return np.cumsum(self.ranges[:, 2])


class StoredFile(NamedTuple):
    """A file of a checkpoint."""

    name: str
    bytes: int
    digests: tuple[str, ...]
    """BLAKE3 digests of its blocks, in hexadecimal."""


@dataclass(frozen=True, eq=False)
class Metadata:
    """Metadata of a checkpoint in its home."""

    home: Home
    name: str
    written: str
    """Time of writing, in ISO format."""
    files: tuple[StoredFile, ...]
    tensors: dict[str, StoredTensor]
    state: dict[str, Any]
    """State, besides tensors, that a run needs to resume, as JSON values."""
    not_finite: Mapping[str, int] | None = None
    """Count of NaN and infinite values by tensor, of those that have any; None if nobody has looked."""
    digest: str = ""
    """Digest of the file that holds the digests of all others, such as blake3:0123…; empty if there is none."""

    @property
    def folder(self) -> Location:
        """Path or URL of the checkpoint."""
        return self.home.location / self.name


def owned_ranges(fragments: Sequence[Fragment]) -> bytes:
    """Return the ranges that a rank owns, in the order of its file, for `encode_layout`.

    Tensors are text, a line each, such as "7x5 model/a", and compressed. Starts and lengths are columns of int64.
    """
    tensors = "\n".join(f"{'x'.join(map(str, fragment.shape))} {fragment.name}" for fragment in fragments)
    names = zlib.compress(tensors.encode(), 1)
    columns = np.array([[f.start for f in fragments], [len(f.data) for f in fragments]], "<i8")
    return len(names).to_bytes(8, "little") + names + columns.tobytes()


def encode_layout(of_ranks: Sequence[bytes]) -> bytes:
    """Return layout.json for the ranges that all ranks own, as `owned_ranges` returns them.

    Raises:
        CheckpointError: an element of a tensor is owned by no rank, or by two.
    """
    numbers: dict[str, int] = {}
    known: dict[bytes, np.ndarray] = {}
    of_files = []
    for file, owned in enumerate(of_ranks):
        end = 8 + int.from_bytes(owned[:8], "little")
        if (names := owned[8:end]) not in known:  # ranks of most engines have ranges of the same tensors
            tensors = zlib.decompress(names).decode().split("\n")
            known[names] = np.array([numbers.setdefault(t, len(numbers)) for t in tensors if t], np.int64)
        starts, lengths = np.frombuffer(owned, "<i8", offset=end).reshape(2, -1)
        offsets = (np.cumsum(lengths) - lengths) * ELEMENT.itemsize
        of_files.append(np.stack([known[names], starts, np.full(len(lengths), file), offsets, lengths]))
    table = np.concatenate(of_files, 1)
    table = table[:, table[4] > 0]
    table = table[:, np.lexsort((table[1], table[0]))]
    bounds = np.searchsorted(table[0], np.arange(len(numbers) + 1))
    layout, texts = [], dict[bytes, str]()
    for tensor, begin, end in zip(numbers, bounds[:-1], bounds[1:], strict=True):
        shape_text, _, name = tensor.partition(" ")
        shape = [int(size) for size in shape_text.split("x") if size]
        _, starts, files, offsets, lengths = table[:, begin:end]
        _check_once(name, math.prod(shape), starts, starts + lengths)
        columns = {"files": files, "offsets": offsets, "lengths": lengths}
        shape_json = json.dumps(shape, separators=(",", ":"))
        ranges = ",".join(f'"{key}":{_json(column, texts)}' for key, column in columns.items())
        layout.append(f'{json.dumps(name)}:{{"shape":{shape_json},"dtype":"float32",{ranges}}}')
    return f"{{{','.join(layout)}}}".encode()


def _json(numbers: np.ndarray, texts: dict[bytes, str]) -> str:
    """Return a JSON list of integers. Equal numbers and equal lists are common, and become text once.

    Args:
        numbers: the integers.
        texts: earlier lists by their bytes.
    """
    key = numbers.tobytes()
    if key not in texts:
        different, places = np.unique(numbers, return_inverse=True)
        each = np.array([str(number) for number in different.tolist()], object)
        texts[key] = f"[{','.join(each[places].tolist())}]"
    return texts[key]


def _check_once(name: str, length: int, starts: np.ndarray, ends: np.ndarray) -> None:
    """Raise CheckpointError unless sorted ranges make up a tensor of this length, in elements."""
    expected = np.concatenate(([0], ends))
    found = np.concatenate((starts, [length]))
    if wrong := np.flatnonzero(expected != found).tolist():
        start, end = found[wrong[0]], expected[wrong[0]]
        ranks = "two ranks" if start < end else "no rank"
        raise CheckpointError(f"element {min(start, end)} of {name} is owned by {ranks}")


def decode_layout(content: str | bytes) -> dict[str, StoredTensor]:
    """Return the tensors that layout.json describes, by name."""
    return {
        name: StoredTensor(
            tuple(stored["shape"]),
            np.array([stored["files"], stored["offsets"], stored["lengths"]], np.int64).T,
        )
        for name, stored in json.loads(content).items()
    }


def encode_metadata(
    files: Sequence[StoredFile],
    layout: StoredFile,
    state: dict[str, Any],
    not_finite: Mapping[str, int] | None = None,
) -> bytes:
    """Return metadata.json, with a digest of itself. The arguments are the fields of `Metadata`."""
    metadata = {
        "format": FORMAT,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "block_bytes": BLOCK_BYTES,
        "files": [file._asdict() for file in files],
        "layout": layout._asdict(),
        "not_finite": not_finite,
        "state": state,
    }
    return json.dumps(metadata | {"blake3": digest_of(_canonical(metadata))}, indent=1).encode()


def decode_metadata(content: bytes, path: Location) -> dict[str, Any]:
    """Return the content of metadata.json, checked against its own digest.

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
    digest = metadata.pop("blake3", None)
    if "sha256" in metadata:  # format 1, which had no blake3
        raise CheckpointError(f"{path} has format {metadata.get('format')!r}; this version reads {FORMAT!r}")
    if digest != digest_of(_canonical(metadata)):
        raise InvalidCheckpointError(f"{path} is damaged: its digest is not the one it was written with")
    if metadata["format"] not in (FORMAT, *EARLIER_FORMATS):
        raise CheckpointError(f"{path} has format {metadata['format']!r}; this version reads {FORMAT!r}")
    return metadata


def file_from(entry: dict[str, Any]) -> StoredFile:
    """Return the file that an entry of metadata.json describes."""
    return StoredFile(entry["name"], entry["bytes"], tuple(entry["digests"]))


def digest_of(content: Any) -> str:
    """Return the BLAKE3 digest of bytes or a buffer, in hexadecimal."""
    return blake3.blake3(content).hexdigest()


def _canonical(metadata: dict[str, Any]) -> bytes:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()


class ReadRange(NamedTuple):
    """A range of a file to read, and its place in the reader's buffer. All numbers but the file's are in bytes."""

    file: int
    offset: int
    length: int
    target: int


def plan_reads(metadata: Metadata, fragments: Sequence[Fragment]) -> list[ReadRange]:
    """Return the ranges that hold the values of fragments, sorted by file and offset.

    The fragments are one after another in the reader's buffer.

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
