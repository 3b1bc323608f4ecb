"""The checkpoint format: flat ranges of fp32 tensors by name, raw in data files, described and digested in JSON.

    step-00001200/
        rank-00000.bin     the ranges one rank owned, back to back, little-endian fp32
        metadata.json      for every tensor its shape and chunks (file, offset, start, length, sha256); the run's state;
                           a digest of itself

No engine, no world size and no pickle is in it: whoever reads asks for the ranges it needs. A chunk is at most
CHUNK_ELEMENTS long, so that a reader of a small range need not read a large tensor.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.fragments import Fragment

FORMAT = "byteloom-checkpoint/1"
ELEMENT = np.dtype("<f4")
CHUNK_ELEMENTS = 16 << 20


class CheckpointError(Exception):
    """A checkpoint cannot be used as asked."""


class InvalidCheckpointError(CheckpointError):
    """A checkpoint is damaged or incomplete."""


@dataclass(frozen=True)
class Chunk:
    file: str
    offset: int
    """Of its first byte in the file."""
    start: int
    """Of its first element in the flattened tensor."""
    length: int
    """In elements."""
    sha256: str


@dataclass(frozen=True)
class StoredTensor:
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Metadata:
    folder: Path
    tensors: dict[str, StoredTensor]
    state: dict[str, Any]
    """What the run needs beside tensors to go on; JSON."""


Tensors = dict[str, dict[str, Any]]
"""Of each tensor by name: shape, dtype and chunks, as JSON."""


def write_data(folder: Path, rank: int, fragments: Sequence[Fragment]) -> Tensors:
    """Writes one rank's data file into a folder, and puts it on disk; returns what is in it."""
    file_name = f"rank-{rank:05d}.bin"
    tensors: Tensors = {}
    with (folder / file_name).open("wb") as file:
        for fragment in fragments:
            stored = tensors.setdefault(fragment.name, {"shape": fragment.shape, "dtype": "float32", "chunks": []})
            values = fragment.data.numpy(force=True).astype(ELEMENT, copy=False)
            for begin in range(0, len(values), CHUNK_ELEMENTS):
                piece = values[begin : begin + CHUNK_ELEMENTS].view(np.uint8).data
                digest = hashlib.sha256(piece).hexdigest()
                chunk = Chunk(file_name, file.tell(), fragment.start + begin, len(piece) // ELEMENT.itemsize, digest)
                stored["chunks"].append(asdict(chunk))
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return tensors


def write_metadata(folder: Path, of_ranks: Sequence[Tensors], state: dict[str, Any]) -> None:
    """Writes what makes a checkpoint of the ranks' data files."""
    tensors: Tensors = {}
    for rank in of_ranks:
        for name, stored in rank.items():
            tensors.setdefault(name, {**stored, "chunks": []})["chunks"].extend(stored["chunks"])
    metadata = {"format": FORMAT, "tensors": tensors, "state": state}
    metadata["sha256"] = digest_of(metadata)
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")


def verify(folder: Path, part: int = 0, parts: int = 1) -> Metadata:
    """Checks every byte of a checkpoint against its digests; or one part of the chunks, so that ranks can share them.

    Raises:
        InvalidCheckpointError: it is damaged or incomplete.
    """
    metadata = read_metadata(folder)
    sizes: dict[str, int] = {}
    number = count()
    for name, tensor in metadata.tensors.items():
        for chunk in tensor.chunks:
            sizes[chunk.file] = max(sizes.get(chunk.file, 0), chunk.offset + chunk.length * ELEMENT.itemsize)
            if next(number) % parts == part and hashlib.sha256(_bytes_of(folder, chunk)).hexdigest() != chunk.sha256:
                raise InvalidCheckpointError(f"{folder / chunk.file} is damaged at tensor {name}")
        if _covered(tensor) != math.prod(tensor.shape):
            raise InvalidCheckpointError(f"{folder} does not hold all of tensor {name}")
    for file, length in sizes.items():
        path = folder / file
        if not path.exists() or path.stat().st_size < length:
            raise InvalidCheckpointError(f"{path} is missing or shorter than what was written")
        if path.stat().st_size > length:
            raise InvalidCheckpointError(f"{path} is longer than what was written")
    return metadata


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a checkpoint, checked against its own digest; the data files are not looked at.

    Raises:
        InvalidCheckpointError: it is missing or damaged.
    """
    path = folder / "metadata.json"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise InvalidCheckpointError(f"{path} is missing or damaged: {error}") from error
    except OSError as error:  # a file system that is away for a while has damaged nothing
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(metadata, dict) or metadata.get("sha256") != digest_of(metadata):
        raise InvalidCheckpointError(f"{path} is damaged: it does not have the digest it was written with")
    if metadata["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {metadata['format']!r}; this version reads {FORMAT!r}")
    tensors = {
        name: StoredTensor(tuple(stored["shape"]), tuple(Chunk(**chunk) for chunk in stored["chunks"]))
        for name, stored in metadata["tensors"].items()
    }
    return Metadata(folder, tensors, metadata["state"])


def read(metadata: Metadata, fragments: Sequence[Fragment]) -> None:
    """Fills live fragments from a verified checkpoint, whatever ranges it was written in.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer; nothing was changed.
    """
    for fragment in fragments:
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
    for fragment in fragments:
        for chunk in metadata.tensors[fragment.name].chunks:
            first = max(chunk.start, fragment.start)
            last = min(chunk.start + chunk.length, fragment.start + len(fragment.data))
            if first < last:
                values = np.frombuffer(_bytes_of(metadata.folder, chunk), ELEMENT)
                piece = torch.from_numpy(values[first - chunk.start : last - chunk.start].astype(np.float32))
                fragment.data[first - fragment.start : last - fragment.start].copy_(piece)


def _covered(tensor: StoredTensor) -> int:
    """Elements covered by chunks from the tensor's beginning up to the first gap."""
    covered = 0
    for chunk in sorted(tensor.chunks, key=lambda c: c.start):
        if chunk.start > covered:
            break
        covered = max(covered, chunk.start + chunk.length)
    return covered


def _bytes_of(folder: Path, chunk: Chunk) -> bytes:
    length = chunk.length * ELEMENT.itemsize
    try:
        with (folder / chunk.file).open("rb") as file:
            file.seek(chunk.offset)
            data = file.read(length)
    except FileNotFoundError as error:
        raise InvalidCheckpointError(f"{folder / chunk.file} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{folder / chunk.file} cannot be read: {error.strerror}") from error
    if len(data) != length:
        raise InvalidCheckpointError(f"{folder / chunk.file} is shorter than what was written")
    return data


def digest_of(metadata: dict[str, Any]) -> str:
    rest = {key: value for key, value in metadata.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
