"""The ids a model reads: the 256 bytes, and two that are no byte."""

import numpy as np
from numpy.typing import NDArray

SEPARATOR = 256
"""Between two documents; predicted like a byte, never counted as one."""
PADDING = 257
"""Fills a row to its length; never a target."""
VOCABULARY = 258


def count_bytes(ids: NDArray[np.integer], targets: NDArray[np.bool_]) -> int:
    """Target bytes: positions that count in the loss and hold one of the 256 bytes.

    The one denominator of every loss and of every bits_per_byte. A separator costs nats and is no byte.
    """
    return int(np.count_nonzero(targets & (ids < SEPARATOR)))
