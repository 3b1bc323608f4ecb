"""Registry of optimizers.

An optimizer is one file, which registers itself:

    register_optimizer(OptimizerEntry(name="lion", build=build_lion, moments=("exp_avg",), works_on_shards=True, ...))

Byteloom's own optimizers are registered by pretrain/optim. Those of other packages are found by the entry point group
`byteloom.optimizers`; the name of an entry point is the name of its optimizer.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import BaseModel
from torch.optim import Optimizer

from byteloom.core.registries.registry import Registry
from byteloom.core.validation import Fault
from pretrain.models.base import ByteModel

if TYPE_CHECKING:
    from pretrain.optim.config import OptimizerConfig


def _no_warnings(_: "OptimizerConfig") -> Sequence[Fault]:
    return ()


def _no_matrices(_: ByteModel) -> Container[str]:
    return ()


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer, as its file declares it. Whatever it does not declare is refused."""

    name: str
    """Value of `optimizer.name` in a recipe; unique."""
    build: Callable[["OptimizerConfig", ByteModel], list[Optimizer]]
    """Builds optimizers that together update every trained parameter (`ByteModel.trained_parameters`). `with_moments`
    makes their state, so that a checkpoint can be read into it before the first step."""
    moments: tuple[str, ...]
    """Names of the tensors that it keeps for each parameter. Checkpoints store them under these names."""
    fields: frozenset[str] = frozenset()
    """Fields of OptimizerConfig that it uses, besides those of every optimizer (`COMMON_FIELDS`)."""
    options: type[BaseModel] | None = None
    """Config node of `optimizer.options`; None if it has no options of its own."""
    works_on_shards: bool = False
    """Whether its update of an element needs no other element of the parameter, so that engines may shard it."""
    works_on_dtensors: bool = False
    """Whether it updates parameters that are DTensors, and gathers what the update of a shard needs."""
    has_sized_steps: bool = False
    """Whether its steps have one size for all elements, whatever the size of the gradient, as `optimizer.scaling` mup
    needs."""
    whole_matrices: Callable[[ByteModel], Container[str]] = _no_matrices
    """Returns the names of the parameters that take Muon's steps, which have a spectral norm."""
    moment_values: Callable[[ByteModel], int] | None = None
    """Returns how many numbers the moments of a model hold. None: every trained parameter has all moments."""
    default_decay: float = 0.1
    """Value of `optimizer.weight_decay` null."""
    warnings: Callable[["OptimizerConfig"], Sequence[Fault]] = _no_warnings
    """Returns values that are valid but most often a mistake."""

    def count_moments(self, model: ByteModel) -> int:
        """Return how many numbers the moments of a model hold."""
        if self.moment_values is None:
            return len(self.moments) * sum(parameter.numel() for parameter in model.trained_parameters().values())
        return self.moment_values(model)


OPTIMIZERS: Registry[OptimizerEntry] = Registry("optimizer", "byteloom.optimizers")


def register_optimizer(entry: OptimizerEntry) -> OptimizerEntry:
    """Add an optimizer, and return it.

    Raises:
        RegistryError: the name is taken.
    """
    OPTIMIZERS.register(entry.name, entry)
    return entry
