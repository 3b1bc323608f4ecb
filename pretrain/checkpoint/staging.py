"""Staging: host memory in chunks of 256 MiB, through which values pass between live tensors and files.

A pinned buffer takes a power of two of bytes, so one buffer of 18 GB would take 32 GiB. Chunks are filled one after
another; a fragment that passes the end of a chunk is cut into pieces.
"""

import contextlib
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pretrain.distributed.fragments import Fragment

CHUNK_BYTES = 256 << 20
"""Bytes of a chunk: a power of two, and a multiple of the blocks that have a digest."""


class Staging:
    """Reused staging memory of one rank."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._is_pinned = False

    def chunks(self, length: int, *, pinned: bool) -> list[Tensor]:
        """Return chunks for this many fp32 values; all are full but the last. What they held is lost.

        Args:
            length: number of values.
            pinned: whether a GPU copies to them or from them.
        """
        capacity = sum(len(chunk) for chunk in self._chunks)
        if capacity < length or pinned != self._is_pinned:
            self._chunks = []  # free the old memory before the new one is allocated
            self._is_pinned = pinned
            for size in _sizes(length):
                self._chunks.append(torch.empty(size, pin_memory=True) if pinned else host_buffer(size))
        return [chunk[:size] for chunk, size in zip(self._chunks, _sizes(length), strict=False)]


def _sizes(length: int) -> list[int]:
    """Return the lengths of the chunks for this many values."""
    full, rest = divmod(length, CHUNK_BYTES // 4)
    return [CHUNK_BYTES // 4] * full + [rest] * bool(rest)


def is_on_gpu(fragments: Sequence[Fragment]) -> bool:
    """Return whether a GPU holds one of the fragments."""
    return any(fragment.data.is_cuda for fragment in fragments)


def pieces_of(fragments: Sequence[Fragment]) -> list[Fragment]:
    """Return fragments cut where a chunk of staging ends and the next begins."""
    pieces, room = [], CHUNK_BYTES // 4
    for fragment in fragments:
        done = 0
        while done < len(fragment.data):
            piece = fragment.part(done, min(len(fragment.data), done + room))
            pieces.append(piece)
            done += len(piece.data)
            room = room - len(piece.data) or CHUNK_BYTES // 4
    return pieces


def places_of(pieces: Sequence[Fragment], chunks: Sequence[Tensor]) -> list[Tensor]:
    """Return the place of each piece in chunks that hold them one after another."""
    places, position = [], 0
    for piece in pieces:
        number, begin = divmod(position, CHUNK_BYTES // 4)
        places.append(chunks[number][begin : begin + len(piece.data)])
        position += len(piece.data)
    return places


def bytes_in(chunks: Sequence[Tensor], begin: int, length: int) -> np.ndarray:
    """Return bytes of staging, which are all in one chunk.

    Args:
        chunks: the staging.
        begin: of the bytes, counted over all chunks.
        length: of the bytes.
    """
    number, offset = divmod(begin, CHUNK_BYTES)
    own: np.ndarray = chunks[number].numpy().view(np.uint8)[offset : offset + length]
    return own


def copy_bytes(chunks: Sequence[Tensor], begin: int, target: np.ndarray) -> None:
    """Fill a buffer with the bytes of staging from a place on. The arguments are those of `bytes_in`."""
    done = 0
    while done < len(target):
        taken = min(len(target) - done, CHUNK_BYTES - (begin + done) % CHUNK_BYTES)
        target[done : done + taken] = bytes_in(chunks, begin + done, taken)
        done += taken


def host_buffer(length: int) -> Tensor:
    """Return a buffer of fp32 values in huge pages, which the kernel allocates in less than half the time."""
    if not length:
        return torch.empty(0)
    pages = mmap.mmap(-1, 4 * length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # the kernel has no huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.float32)
