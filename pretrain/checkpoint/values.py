"""Values of a checkpoint: copies of them, and the search for those that are NaN or infinite.

    save    live fragments ─▶ staging buffer, each piece looked at while it is in the cache of the core that copied it
                              (on a GPU: by a reduction on the stream of the copy)
    read    window of a file, looked at after its digests

The result is a count by tensor, of the tensors that have such values. The memory that a model carries does not count:
parts of it are undefined.
"""

import os
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from byteloom.core.storage.locations import Location
from byteloom.core.text import count
from pretrain.checkpoint.errors import InvalidCheckpointError
from pretrain.checkpoint.format import ELEMENT, StoredTensor
from pretrain.distributed.fragments import MEMORY, Fragment, split_name

COPY_ELEMENTS = 4 << 20
"""Elements that a thread copies at a time."""
CACHED_ELEMENTS = 1 << 17
"""Elements that stay in the cache of a core between their copy and the look at them."""
INFINITY = 0x7F800000
"""Bits of positive infinity in fp32. The bits of a NaN without its sign are a larger number."""
NAMED = 3
"""Tensors that a message names."""


class Staged(NamedTuple):
    """Copy of what a rank saves."""

    chunks: list[Tensor]
    """Values of its fragments, one after another."""
    not_finite: dict[str, int]
    """Counts of values that are NaN or infinite, by tensor."""


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy flat tensors to others: in a few threads in host memory, on a stream of its own on a GPU."""
    _copy(targets, sources, look=False)


def copy_and_look(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> list[int]:
    """Copy as `copy` does; return the numbers of the tensors that have a value which is not finite."""
    return _copy(targets, sources, look=True)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor], *, look: bool) -> list[int]:
    here: list[tuple[int, Tensor, Tensor]] = []
    streams: dict[torch.device, torch.cuda.Stream] = {}
    largest: dict[int, Tensor] = {}
    for number, (target, source) in enumerate(zip(targets, sources, strict=True)):
        device = target.device if target.is_cuda else source.device
        if device.type != "cuda":
            parts = zip(target.split(COPY_ELEMENTS), source.split(COPY_ELEMENTS), strict=True)
            here += ((number, *part) for part in parts)
            continue
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
            streams[device].wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(streams[device]):
            target.copy_(source, non_blocking=True)
            if look and len(source):
                largest[number] = torch.linalg.vector_norm(source, float("inf")).to("cpu", non_blocking=True)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda part: _copy_here(part[1].numpy(), part[2].numpy(), look=look), here))
    for stream in streams.values():
        stream.synchronize()
    suspects = {number for (number, _, _), is_finite in zip(here, found, strict=True) if not is_finite}
    suspects |= {number for number, value in largest.items() if not torch.isfinite(value)}
    return sorted(suspects)


def _copy_here(target: np.ndarray, source: np.ndarray, *, look: bool) -> bool:
    """Copy values in host memory; return whether all are finite, or True if they are not looked at."""
    if not look:
        np.copyto(target, source)
        return True
    finite = True
    for begin in range(0, len(source), CACHED_ELEMENTS):
        part = target[begin : begin + CACHED_ELEMENTS]
        np.copyto(part, source[begin : begin + CACHED_ELEMENTS])
        finite &= is_finite(part)
    return finite


def is_finite(values: np.ndarray) -> bool:
    """Return whether no value of a flat fp32 array is NaN or infinite.

    Infinities and NaNs are the largest values of the bits as integers: signed for those without a sign bit, unsigned
    for those with one. This needs no array of its own, and no value makes it slow.
    """
    if not len(values):
        return True
    return bool(values.view(np.int32).max() < INFINITY and values.view(np.uint32).max() < INFINITY | 1 << 31)


def count_not_finite(fragments: Sequence[Fragment]) -> dict[str, int]:
    """Return the counts of values that are not finite in fragments, by tensor."""
    counts: Counter[str] = Counter()
    for fragment in fragments:
        if split_name(fragment.name)[0] != MEMORY:
            counts[fragment.name] += len(fragment.data) - int(torch.isfinite(fragment.data).sum())
    return dict(+counts)


class StoredValues:
    """Counts of the values of files that are not finite, by the tensor that they belong to. Safe to use from threads.

    Args:
        tensors: where the values of each tensor are.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._ranges: dict[int, tuple[np.ndarray, list[str]]] | None = None
        """By file: the sorted starts of ranges in elements, and the tensor of each."""

    @property
    def counts(self) -> dict[str, int]:
        """Counts so far, without the memory that a model carries."""
        return {name: number for name, number in self._counts.items() if split_name(name)[0] != MEMORY}

    def look(self, file: int, offset: int, content: np.ndarray) -> None:
        """Look at bytes of a file from an offset on."""
        values = content.view(ELEMENT)
        if is_finite(values):
            return
        places = offset // ELEMENT.itemsize + np.flatnonzero(~np.isfinite(values))
        with self._lock:
            starts, names = self._ranges_of(file)
            numbers, counts = np.unique(np.searchsorted(starts, places, side="right") - 1, return_counts=True)
            for number, found in zip(numbers.tolist(), counts.tolist(), strict=True):
                self._counts[names[number]] += found

    def _ranges_of(self, file: int) -> tuple[np.ndarray, list[str]]:
        if self._ranges is None:
            by_file = defaultdict[int, list[tuple[int, str]]](list)
            for name, tensor in self._tensors.items():
                for number, offset, length in tensor.ranges.tolist():
                    if length:
                        by_file[number].append((offset // ELEMENT.itemsize, name))
            self._ranges = {
                number: (np.array([start for start, _ in ranges]), [name for _, name in ranges])
                for number, ranges in ((number, sorted(ranges)) for number, ranges in by_file.items())
            }
        return self._ranges[file]


def merged_counts(of_ranks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums of the counts of ranks."""
    return dict(sum((Counter(counts) for counts in of_ranks), Counter[str]()))


def describe_not_finite(counts: Mapping[str, int]) -> str:
    """Return the tensors that have values which are not finite, with their counts, as a clause."""
    named = ", ".join(f"{name} ({number:,})" for name, number in list(counts.items())[:NAMED])
    more = f" and {count(len(counts) - NAMED, 'more tensor')}" if len(counts) > NAMED else ""
    return f"values that are NaN or infinite in {named}{more}"


def describe_since(counts: Mapping[str, int], step: int, finite_step: int) -> str:
    """Return a clause about values that are not finite, and since when.

    Args:
        counts: of these values, by tensor.
        step: after which they were found.
        finite_step: newest step after which all values were finite.
    """
    first = finite_step + 1
    since = f"since step {step}" if first >= step else f"since a step from {first} to {step}"
    return f"there are {describe_not_finite(counts)} {since}; all were finite after step {finite_step}"


def refuse_not_finite(checkpoint: Location, counts: Mapping[str, int]) -> None:
    """Raise InvalidCheckpointError if values of a checkpoint are not finite."""
    if counts:
        raise InvalidCheckpointError(f"{checkpoint} has {describe_not_finite(counts)}")
