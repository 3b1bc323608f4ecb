"""Memory of tensors on a CPU, kept by the process that freed it."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's mallopt."""
LARGEST_KEPT = 32 << 20
"""Bytes of a tensor. Larger ones go back to the kernel: a heap in pieces may be twice as large as what is in it."""


def keep_freed_memory() -> None:
    """Has malloc use freed memory again, where it would give much of it back to the kernel.

    Every step frees and asks for the same tensors. The kernel clears what it hands out, on one core and while the loop
    waits: a tenth of a step. Only glibc's malloc can be told; with another one nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_TOP_PAD, 64 << 20)
