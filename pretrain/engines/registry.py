"""Registry of engines.

An engine declares what it supports. The config refuses all else when a recipe is read:

    register_engine(EngineEntry(name="ddp", load=_load, sharding=REPLICATED, precisions=..., fields=..., ...))

Byteloom's own engines are registered by builtin.py. Those of other packages are found by the entry point group
`byteloom.engines`; the name of an entry point is the name of its engine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel

from byteloom.core.registries.registry import Registry
from pretrain.distributed.world import World
from pretrain.models.base import ByteModel
from pretrain.optim import OptimizerConfig, OptimizerEntry

if TYPE_CHECKING:
    from pretrain.engines.config import EngineConfig
    from pretrain.engines.engine import Engine


@dataclass(frozen=True)
class StateSharding:
    """Distribution of a model's states over the ranks of an engine. `byteloom estimate` has a row for each."""

    label: str
    """Name of its row. Engines that share a label hold the same."""
    weights: bool = False
    """Whether each rank holds a share of the weights, and gathers blocks when they are used."""
    gradients: bool = False
    """Whether each rank holds a share of the gradients."""
    optimizer: bool = False
    """Whether each rank holds a share of masters and moments."""
    copies_weights: bool = False
    """Whether a rank holds a copy of the weights besides the masters, also in fp32."""
    sums_in_last_pass: bool = False
    """A rank holds whole gradients until the last of several passes sums them over ranks."""
    within_groups: bool = False
    """Whether states are sharded within groups of `engine.shards` ranks only, so that each group holds everything."""


class EngineBuilder(Protocol):
    """Makes one rank's engine of a model; arguments as of `BaseEngine`."""

    def __call__(
        self,
        config: "EngineConfig",
        model: ByteModel,
        optimizer: OptimizerConfig,
        seed: int,
        world: World,
        *,
        global_batch: int,
        micro_batch: int,
    ) -> "Engine":
        """Return the engine, with the model in it."""


@dataclass(frozen=True)
class EngineEntry:
    """An engine, as its file declares it. Whatever it does not declare is refused."""

    name: str
    """Value of `engine.name` in a recipe; unique."""
    load: Callable[[], EngineBuilder]
    """Imports the engine's class, and returns it. Only a run that uses the engine calls this."""
    sharding: StateSharding
    """Sharding of the states over ranks."""
    precisions: frozenset[str]
    """Values of `engine.precision` that it computes in, without auto."""
    checkpointing: frozenset[str] = frozenset({"none"})
    """Modes of `engine.activation_checkpointing` that it supports."""
    fields: frozenset[str] = frozenset()
    """Optional fields of EngineConfig that it supports, among `OPTIONAL_FIELDS`."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why it does not support an optional field, for messages: a clause such as "which holds everything"."""
    options: type[BaseModel] | None = None
    """Config node of `engine.options`; None if it has no options of its own."""
    whole_parameters: bool = False
    """Whether its optimizers work on whole parameters, so that it supports those that cannot work on shards."""
    dtensors: bool = False
    """Its optimizers get parameters as DTensors. It supports optimizers that work on DTensors."""
    optimizers: frozenset[str] | None = None
    """Names of the optimizers that it supports; None is all that work on what it holds."""
    needs_several_ranks: bool = False
    """Whether it does not run in one process."""
    package: str | None = None
    """Optional package that it imports."""

    def holds_parameters_for(self, optimizer: OptimizerEntry) -> bool:
        """Return whether it holds parameters in a form that an optimizer works on."""
        return optimizer.works_on_shards or self.whole_parameters or (self.dtensors and optimizer.works_on_dtensors)

    def supports(self, optimizer: OptimizerEntry) -> bool:
        """Return whether it supports an optimizer."""
        is_named = self.optimizers is None or optimizer.name in self.optimizers
        return is_named and self.holds_parameters_for(optimizer)


OPTIONAL_FIELDS = ("shards", "context", "offload", "reshard_after_forward", "compile", "deepspeed")
"""Fields of EngineConfig that only some engines support, in the order in which they are checked."""

ENGINES: Registry[EngineEntry] = Registry("engine", "byteloom.engines")


def register_engine(entry: EngineEntry) -> EngineEntry:
    """Add an engine, and return it.

    Raises:
        RegistryError: the name is taken.
    """
    ENGINES.register(entry.name, entry)
    return entry


def engines_where(supports: Callable[[EngineEntry], bool]) -> str:
    """Return the names of the engines that support something, as "ddp, fsdp and hsdp"."""
    *names, last = [name for name, entry in ENGINES.entries().items() if supports(entry)] or ["no engine"]
    return f"{', '.join(names)} and {last}" if names else last
