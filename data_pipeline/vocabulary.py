"""Ids that a model reads: the 256 bytes, a separator and padding."""

import numpy as np
from numpy.typing import NDArray

SEPARATOR = 256
"""Id between two documents. It is predicted like a byte and never counted as one."""
PADDING = 257
"""Id that fills a row to its length. It is never a target."""
VOCABULARY = 258


def count_bytes(ids: NDArray[np.integer], targets: NDArray[np.bool_]) -> int:
    """Return the number of target bytes: positions that count in the loss and hold one of the 256 bytes.

    Every loss and every bits_per_byte is divided by this number. A separator adds to the loss and is no byte.
    """
    return int(np.count_nonzero(targets & (ids < SEPARATOR)))


def count_bytes_by_row(ids: NDArray[np.integer], targets: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return `count_bytes` of each row: (rows,), given (rows, T) ids and targets."""
    return np.count_nonzero(targets & (ids < SEPARATOR), axis=-1)
