"""First values of parameters, before training.

    seed, name ─▶ key ┐
    block 0, 1, 2, …  ┴▶ Philox ─▶ 8 uniform numbers a block ─▶ quantiles of the cut normal distribution

Any range of a parameter is drawn alone. Philox 4x64-10 is a counter-based generator: block b is a function of the key
and b (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). NumPy guarantees its stream. The quantile
function is a fraction of polynomials in fp32. It takes only sums, products and quotients, one at a time, so that all
CPUs round in the same way.

Version 1 drew each parameter whole, by torch's generator. Runs that began with it keep it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from byteloom.core.seeds import seed_of

FIRST_VALUES = 2
"""Version of the generator of first values."""
WHOLE_DRAWING = 1
"""Version of the generator that draws each parameter whole."""
CUT = 2.0
"""Standard deviations at which the normal distribution is cut."""
BLOCK_VALUES = 8
"""Values of a block of Philox: four words of 64 bits."""
CACHED_VALUES = 1 << 15
"""Values that are drawn at a time; they stay in the cache of a core. A multiple of `BLOCK_VALUES`."""
NUMERATOR = (1.9999998645149983, 24.2560526600212, 74.48846215392597, 54.23898417860012, 4.384148517786001)
DENOMINATOR = (1.0, 13.837845063019751, 52.42437274726765, 55.251017868524926, 10.705215725636283)
"""Coefficients of the quantile function, of rising powers of 1 - s²: least squares of the relative error, reweighted
until its maximum was smallest (7e-8; in fp32 4e-7)."""


@dataclass(frozen=True)
class Initial:
    """Normal distribution that is cut at two standard deviations; a constant if the deviation is 0; or any other."""

    std: float = 0.0
    """Standard deviation before the cut."""
    mean: float = 0.0
    """Mean, or the constant."""
    quantile: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None
    """Quantile function of another distribution: maps numbers between 0 and 1 to values, element by element."""

    def times(self, factor: float) -> "Initial":
        """Return the distribution of values that are multiplied by a factor."""
        quantile = self.quantile
        if quantile is None:
            return Initial(self.std * factor, self.mean * factor)
        return Initial(quantile=lambda numbers: factor * quantile(numbers))


@dataclass(frozen=True)
class ParameterScale:
    """First values and learning rates of a parameter of a scaled model."""

    initial: Initial
    """Distribution of the first values."""
    rate: float = 1.0
    """Factor of the rate of optimizers whose steps have one size for all elements, such as Adam."""
    muon_rate: float = 1.0
    """Factor of the rate of Muon."""
    multiplier: float = 1.0
    """Factor of all rates that the base model declares; see `ByteModel.rate_multiplier`."""


@runtime_checkable
class DeclaresInitial(Protocol):
    """Module that declares the first values of its own parameters, such as a norm."""

    def own_initial(self, parameter: str) -> Initial:
        """Return the distribution of the first values of one of its parameters.

        Args:
            parameter: name within the module, such as "weight".
        """


def draw(initial: Initial, seed: int, name: str, begin: int, end: int) -> Tensor:
    """Return the values of a range of a flattened parameter: fp32, on the CPU.

    Args:
        initial: their distribution.
        seed: of the run.
        name: of the parameter.
        begin: of the range.
        end: of the range, exclusive.
    """
    if not initial.std and initial.quantile is None:
        return torch.full((end - begin,), initial.mean)
    values = np.empty(end - begin, np.float32)
    key = seed_of("first values", seed, name)

    def fill(first: int) -> None:
        part = values[first - begin : first - begin + CACHED_VALUES]
        numbers = _uniform(key, first, len(part))
        if initial.quantile is not None:  # in fp64, whose last bit may depend on the CPU; rounding to fp32 drops it
            part[:] = initial.quantile((numbers.astype(np.float64) + 1) / 2)
            return
        _quantiles(numbers, part)
        part *= np.float32(initial.std)
        part += np.float32(initial.mean)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(fill, range(begin, end, CACHED_VALUES)):
            pass
    return torch.from_numpy(values)


def draw_whole(initial: Initial, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the values of a parameter in version 1: fp32, on the CPU."""
    if initial.quantile is not None:
        raise ValueError(f"version {WHOLE_DRAWING} of the generator draws normal distributions alone, not {name}")
    if not initial.std:
        return torch.full(shape, initial.mean)
    generator = torch.Generator().manual_seed(seed_of("parameter", seed, name))
    low, high = initial.mean - CUT * initial.std, initial.mean + CUT * initial.std
    return nn.init.trunc_normal_(torch.empty(shape), initial.mean, initial.std, low, high, generator=generator)


def _uniform(key: int, begin: int, length: int) -> np.ndarray:
    """Return fp32 numbers between -1 and 1: odd multiples of 2^-24, all equally likely and exact."""
    block, skipped = divmod(begin, BLOCK_VALUES)
    words = np.random.Philox(key=key, counter=block).random_raw(-(-(skipped + length) // 2))
    bits = words.astype("<u8", copy=False).view("<i4")[skipped : skipped + length] >> 8
    numbers = bits.astype(np.float32)
    numbers += np.float32(0.5)
    numbers *= np.float32(2.0**-23)
    return numbers


def _quantiles(numbers: np.ndarray, values: np.ndarray) -> None:
    """Write the quantiles of the standard normal distribution, cut at two deviations, for numbers between -1 and 1."""
    rest = numbers * numbers
    np.subtract(np.float32(1), rest, out=rest)
    below = _polynomial(DENOMINATOR, rest, np.empty_like(rest))
    _polynomial(NUMERATOR, rest, values)
    values /= below
    values *= numbers


def _polynomial(coefficients: tuple[float, ...], at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Write the values of a polynomial, given the coefficients of rising powers; return them."""
    *lower, highest = map(np.float32, coefficients)
    values.fill(highest)
    for coefficient in reversed(lower):
        values *= at
        values += coefficient
    return values
