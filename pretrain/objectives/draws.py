"""Random numbers of one row: a function of the seed and the row's sequence number.

NumPy guarantees the stream of Philox's raw words, and none of its distributions. So everything here is made of words.
"""

import numpy as np
from numpy.typing import NDArray

from byteloom.core.seeds import seed_of


class Draws:
    """Random numbers of a row, in the order of the calls.

    Args:
        seed: of the run.
        sequence: sequence number of the row.
    """

    def __init__(self, seed: int, sequence: int) -> None:
        self._words = np.random.Philox(key=seed_of("objective", seed, sequence))

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return (count,) numbers of 53 bits, at least 0 and less than 1."""
        words: NDArray[np.uint64] = self._words.random_raw(count)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, bound: int, count: int) -> NDArray[np.int64]:
        """Return (count,) integers of at least 0 and less than `bound`."""
        return (self.uniform(count) * bound).astype(np.int64)

    def choose(self, count: int, chosen: int) -> NDArray[np.int64]:
        """Return `chosen` different integers below `count`, in ascending order. All choices are equally likely."""
        return np.sort(np.argsort(self.uniform(count), kind="stable")[:chosen])
