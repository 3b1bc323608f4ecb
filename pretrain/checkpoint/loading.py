"""Loading: each rank reads and verifies a share of a checkpoint's bytes; ranks exchange what their fragments need.

    bytes of all files   |0         |1         |2         |     one share a rank, of whole blocks
                          ╲    ╳    ╳    ╱                      rounds of about 256 MiB a rank
    fragments             of rank 0   of rank 1   of rank 2     any ranges; replicas need the same ones

A share does not depend on what its reader needs, so a load reads each byte once for any engine and number of ranks. One
process reads only the ranges that it needs. No fragment changes before all ranks have verified their shares.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from byteloom.core.progress import Progress, ignore
from pretrain.checkpoint.data import check_sizes, read_windows, share_of, share_starts, windows_of
from pretrain.checkpoint.errors import CheckpointError
from pretrain.checkpoint.format import ELEMENT, Metadata, ReadRange, plan_reads
from pretrain.checkpoint.staging import CHUNK_BYTES, Staging, copy_bytes, is_on_gpu, pieces_of, places_of
from pretrain.checkpoint.values import StoredValues, copy
from pretrain.distributed.fragments import Fragment
from pretrain.distributed.world import ALONE, World


def read(metadata: Metadata, fragments: Sequence[Fragment], progress: Progress = ignore, world: World = ALONE) -> None:
    """Fill live fragments from a checkpoint, after all that they need was verified. All ranks of the world call it.

    The fragments may be other ranges than those in which the checkpoint was written.

    Args:
        metadata: of the checkpoint.
        fragments: what to fill.
        progress: called with bytes read and bytes in all, of this rank.
        world: ranks that read together; each gives its own fragments.

    Raises:
        InvalidCheckpointError: a part that they need is damaged; no fragment was changed.
        CheckpointError: the checkpoint is of another model or optimizer, or cannot be read; no fragment was changed. Or
            another rank has found so.
    """
    share, fault = None, None
    try:
        share = Share(metadata, fragments, world, Staging(), progress)
    except CheckpointError as error:
        fault = error
    faults = [text for text in world.gather(None if fault is None else str(fault)) if text is not None]
    if share is None or faults:
        raise fault or CheckpointError(faults[0])
    share.fill()


class Share:
    """Bytes that one rank reads of a checkpoint for itself and others. Its constructor reads and verifies it.

    Args:
        metadata: of the checkpoint.
        fragments: of this rank.
        world: the ranks; all make a share of the same checkpoint.
        staging: holds the share until `fill` has ended.
        progress: called with bytes read and bytes in all, of this rank.

    Raises:
        InvalidCheckpointError: the share is damaged.
        CheckpointError: the checkpoint is of another model or optimizer, or cannot be read.
    """

    def __init__(
        self,
        metadata: Metadata,
        fragments: Sequence[Fragment],
        world: World,
        staging: Staging,
        progress: Progress = ignore,
    ) -> None:
        self._metadata, self._world = metadata, world
        self._fragments = pieces_of(fragments) if world.size == 1 else fragments
        self._needs = plan_reads(metadata, self._fragments)
        ranges = self._needs if world.size == 1 else share_of(metadata, world.rank, world.size)
        values = -(-sum(each.length for each in ranges) // ELEMENT.itemsize)
        self._chunks = staging.chunks(values, pinned=is_on_gpu(fragments))
        found = StoredValues(metadata.tensors)
        check_sizes(metadata, {each.file for each in ranges})
        is_unknown = metadata.not_finite is None
        read_windows(metadata, windows_of(ranges), self._chunks, progress, found if is_unknown else None)
        self.not_finite: Mapping[str, int] = found.counts if metadata.not_finite is None else metadata.not_finite
        """Counts of values that are not finite: those of the metadata, or those of this share if it has none."""

    def fill(self) -> None:
        """Fill the fragments. All ranks call it, after all have read their shares."""
        if self._world.size == 1:
            places = [_as_read(place) for place in places_of(self._fragments, self._chunks)]
            copy([fragment.data for fragment in self._fragments], places)
            return
        starts = share_starts(self._metadata, self._world.size)
        ranges = np.array(self._needs, np.int64).reshape(-1, len(ReadRange._fields))
        own_bytes = float(ranges[:, 2].sum())
        rounds = max(1, *(-(-int(most) // CHUNK_BYTES) for [most] in self._world.gather_numbers(own_bytes)))
        slice_bytes = max(1, -(-int(np.diff(starts).max()) // (rounds * ELEMENT.itemsize))) * ELEMENT.itemsize
        wanted = _wanted(self._metadata, ranges, starts, slice_bytes)
        asked = self._ask(wanted)
        order = np.argsort(wanted.slices, kind="stable")
        for number in range(rounds):
            sent, sent_bytes = self._collect([each.of_slice(number, slice_bytes) for each in asked])
            mine = order[slice(*np.searchsorted(wanted.slices[order], (number, number + 1)))]
            lengths = np.bincount(wanted.readers[mine], wanted.lengths[mine], self._world.size).astype(np.int64)
            received = self._world.exchange(sent, sent_bytes, lengths.tolist())
            self._copy(received, wanted.targets[mine], wanted.lengths[mine])

    def _ask(self, wanted: "_Wanted") -> "list[_Asked]":
        """Tell each reader which ranges of its share this rank wants; return what others want of this rank's share."""
        world = self._world
        counts = np.bincount(wanted.readers, minlength=world.size)
        asked = world.exchange(torch.from_numpy(counts), [1] * world.size, [1] * world.size).tolist()
        own = torch.from_numpy(np.stack([wanted.offsets, wanted.lengths], 1).reshape(-1))
        requests = world.exchange(own, (2 * counts).tolist(), [2 * count for count in asked])
        of_ranks = requests.view(-1, 2).numpy()
        return [_Asked(*part.T) for part in np.split(of_ranks, np.cumsum(asked)[:-1])]

    def _collect(self, asked: "Sequence[_Asked]") -> tuple[Tensor, list[int]]:
        """Return the bytes of this rank's share that each rank wants in a round, by rank, and their numbers."""
        lengths = [int(each.lengths.sum()) for each in asked]
        collected = np.empty(sum(lengths), np.uint8)
        place = 0
        for each in asked:
            for begin, end in each.joined():
                copy_bytes(self._chunks, begin, collected[place : place + end - begin])
                place += end - begin
        return torch.from_numpy(collected), lengths

    def _copy(self, received: Tensor, targets: np.ndarray, lengths: np.ndarray) -> None:
        """Copy received bytes to the ranges of live fragments that they are for."""
        values = _as_read(received.view(torch.float32))
        starts = np.cumsum([0, *(len(fragment.data) for fragment in self._fragments)])
        begins, counts = targets // ELEMENT.itemsize, (lengths // ELEMENT.itemsize).tolist()
        numbers = np.searchsorted(starts, begins, side="right") - 1
        places = zip(numbers.tolist(), (begins - starts[numbers]).tolist(), counts, strict=True)
        live = [self._fragments[number].data[begin : begin + count] for number, begin, count in places]
        copy(live, values.split(counts))


class _Wanted(NamedTuple):
    """Columns of what a rank wants of the shares of all ranks, by reader and offset; in bytes."""

    readers: np.ndarray
    """Ranks that read it."""
    slices: np.ndarray
    """Number of the slice of the reader's share; slices are exchanged in turn."""
    offsets: np.ndarray
    """Starts in the readers' shares."""
    lengths: np.ndarray
    targets: np.ndarray
    """Starts in the flattened fragments of this rank, one after another."""


class _Asked(NamedTuple):
    """Columns of what one rank wants of this rank's share, by offset; in bytes."""

    offsets: np.ndarray
    lengths: np.ndarray

    def of_slice(self, number: int, slice_bytes: int) -> "_Asked":
        """Return what lies in a slice of the share."""
        begin, end = np.searchsorted(self.offsets, (number * slice_bytes, (number + 1) * slice_bytes))
        return _Asked(self.offsets[begin:end], self.lengths[begin:end])

    def joined(self) -> list[tuple[int, int]]:
        """Return begin and end of each range; ranges that follow each other are one."""
        ends = self.offsets + self.lengths
        breaks = np.flatnonzero(self.offsets[1:] != ends[:-1])
        begins = self.offsets[np.concatenate(([0], breaks + 1))] if len(ends) else ends
        last = ends[np.concatenate((breaks, [len(ends) - 1]))] if len(ends) else ends
        return list(zip(begins.tolist(), last.tolist(), strict=True))


def _wanted(metadata: Metadata, ranges: np.ndarray, starts: np.ndarray, slice_bytes: int) -> _Wanted:
    """Return ranges of files as ranges of shares, cut where a slice of a share ends.

    Args:
        metadata: of the checkpoint.
        ranges: (n, 4) columns of `ReadRange`, sorted.
        starts: of shares and the end of the last, counted over the bytes of all files.
        slice_bytes: length of the slices of each share.
    """
    file_starts = np.cumsum([0, *(file.bytes for file in metadata.files)])
    files, offsets, lengths, targets = ranges.T
    begins = file_starts[files] + offsets
    cuts = np.concatenate([np.arange(a, b, slice_bytes) for a, b in pairwise(starts)])
    first = np.searchsorted(cuts, begins, side="right")
    more = np.searchsorted(cuts, begins + lengths, side="left") - first
    whole = np.repeat(np.arange(len(ranges)), 1 + more)
    number = np.arange(len(whole)) - np.repeat(np.cumsum(1 + more) - (1 + more), 1 + more)
    inner = np.minimum(first[whole] + number, len(cuts)) - 1
    own_begins = np.where(number == 0, begins[whole], cuts[inner])
    is_last = number == more[whole]
    own_ends = np.where(is_last, (begins + lengths)[whole], cuts[np.minimum(inner + 1, len(cuts) - 1)])
    readers = np.searchsorted(starts, own_begins, side="right") - 1
    in_share = own_begins - starts[readers]
    own_targets = targets[whole] + own_begins - begins[whole]
    return _Wanted(readers, in_share // slice_bytes, in_share, own_ends - own_begins, own_targets)


def _as_read(values: Tensor) -> Tensor:
    """Return little-endian values of a file as this machine's."""
    return torch.from_numpy(values.numpy().view(ELEMENT).astype(np.float32, copy=False))
