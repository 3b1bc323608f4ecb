"""Memory of tensors on a CPU, kept by the process that freed it."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Has malloc use freed memory again, where it would give each large tensor back to the kernel.

    Every step frees and asks for the same tensors. The kernel clears what it hands out, on one core and while the loop
    waits: a tenth of a step and more. Only glibc's malloc can be told; with another one nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_TOP_PAD, 64 << 20)
