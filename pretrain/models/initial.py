"""First values of parameters, before training."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class Initial:
    """Normal distribution that is cut at two standard deviations; a constant if the deviation is 0."""

    std: float = 0.0
    """Standard deviation before the cut."""
    mean: float = 0.0
    """Mean, or the constant."""


@runtime_checkable
class DeclaresInitial(Protocol):
    """Module that declares the first values of its own parameters, such as a norm."""

    def own_initial(self, parameter: str) -> Initial:
        """Return the distribution of the first values of one of its parameters.

        Args:
            parameter: name within the module, such as "weight".
        """
