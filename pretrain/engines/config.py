"""Config of the engine, and what it can be combined with."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    Field,
    GetJsonSchemaHandler,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from byteloom.core.registries.names import RegisteredName, validated_options
from byteloom.core.text import count
from byteloom.core.validation import Mismatch, describe_value
from pretrain.engines.engine import EngineError
from pretrain.engines.registry import ENGINES, OPTIONAL_FIELDS, EngineEntry, engines_where
from pretrain.optim import OptimizerConfig

CheckpointingMode = Literal["none", "full", "selective", "budget"]


class CheckpointingConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Activation checkpointing: what blocks keep of a forward pass. The backward pass computes the rest again.

    A name alone is its mode. Training is the same bit for bit, except for what compilation rounds.
    """

    mode: CheckpointingMode = "none"
    """Activations that are computed again. none: nothing. full: all of a block, from its input, for a third more work.
    selective: what lies between matrix products and attention, whose outputs are kept. budget: what torch.compile finds
    the cheapest; it needs engine.compile. selective does not work with engine.compile."""
    every: int = Field(default=1, ge=1)
    """For full and selective: only every k-th block of a stack, the first included."""
    stacks: tuple[str, ...] = ()
    """For full and selective: only blocks of these stacks; [] is all. MEGABYTE has global and local, other models
    blocks."""
    budget: float = Field(default=0.5, ge=0, le=1)
    """For budget: share to keep of the activations that compiled blocks keep by default."""

    @model_validator(mode="before")
    @classmethod
    def _mode_alone(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Accept a mode, or a section."""
        return {"anyOf": [{"enum": list(get_args(CheckpointingMode))}, handler(core_schema)]}

    @field_validator("stacks", mode="before")
    @classmethod
    def _names_as_a_tuple(cls, value: Any) -> Any:
        """Return a list as a tuple: after `_mode_alone`, strict validation no longer takes a list of JSON for one."""
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _budget_is_of_all_blocks(self) -> Self:
        if self.mode == "budget" and (self.every > 1 or self.stacks):
            raise ValueError("mode budget is for all blocks, without every and stacks")
        return self


class EngineConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Placement and precision of a model."""

    name: Annotated[str, RegisteredName(ENGINES)] = "ddp"
    """Engine of the run. It decides what each rank holds. ddp: everything; it also runs in one process. fsdp: a share
    of parameters, gradients and moments (PyTorch's FSDP2). hsdp: the same within groups of `shards` ranks, each of
    which holds all. zero1, zero2, zero3: DeepSpeed's stages: a share of masters and moments, of gradients too, of
    parameters too."""
    shards: int | None = Field(default=None, ge=1)
    """For hsdp: ranks that hold one whole model together. It must divide the number of ranks."""
    context: int = Field(default=1, ge=1)
    """Ranks that share each row (context parallelism); they compute equal parts of it. It must divide the number of
    ranks. Losses are those of one process. On CUDA, the dropout of attention weights differs. For ddp, fsdp and hsdp.
    """
    reshard_after_forward: bool = True
    """For fsdp and hsdp: drop a block's gathered parameters after its forward pass. They are gathered again for
    backward. If false, each rank holds the model in the precision of the passes, and communicates a third less."""
    offload: bool = False
    """Keep the optimizer's tensors (masters, gradients, moments) in the host's memory. Not for ddp."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. auto is CUDA if there is a CUDA device, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Precision of forward and backward passes, for parameters and activations. Masters, moments, accumulated
    gradients, sums over ranks and the loss are always fp32. auto is bf16 on a device that multiplies bf16 natively
    (CUDA of capability 8.0 or more, CPUs with AMX or AVX512_BF16), else fp32; a run keeps its first choice on every
    machine. fp8 is bf16 whose linear maps within blocks multiply in float8, scaled by tensor, through torchao; it needs
    CUDA of capability 8.9 and ddp, fsdp or hsdp. It is faster only with `compile`."""
    activation_checkpointing: CheckpointingConfig = CheckpointingConfig()
    deterministic: bool = False
    """On CUDA, use deterministic algorithms only. A run that repeats or resumes with as many ranks is then equal bit
    for bit. It is slower, and an operation without such an algorithm is an error. On a CPU, all are deterministic."""
    compile: bool = False
    """Compile each block with torch.compile. It takes a minute or more at the start, and needs a C++ compiler on a CPU.
    The gradient then differs by roundings. Not for zero3."""
    deepspeed: dict[str, Any] = {}
    """For zero1, zero2 and zero3: more keys of DeepSpeed's own config. They override the keys that the recipe implies.
    """
    options: dict[str, Any] = Field(default={}, validate_default=True)
    """Options of an engine of another package. Byteloom's own engines have none."""

    @field_validator("options")
    @classmethod
    def _options_are_the_engines(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "name" not in info.data:  # it is wrong, which is reported
            return value
        entry = ENGINES.get(info.data["name"])
        return validated_options("engine.options", entry.options, value, owner=f"engine.name {entry.name}")

    @model_validator(mode="after")
    def _engine_supports_the_fields(self) -> Self:
        for name in OPTIONAL_FIELDS:
            value = getattr(self, name)
            if value == type(self).model_fields[name].default or name in self.entry.fields:
                continue
            raise ValueError(self._unsupported(name))
        for key, source in _DERIVED_KEYS.items():
            section, _, entry = key.rpartition(".")
            node = self.deepspeed.get(section, {}) if section else self.deepspeed
            if isinstance(node, dict) and entry in node:
                raise ValueError(f"engine.deepspeed has {key}, which follows from {source}; set that field instead")
        return self

    def _unsupported(self, field: str) -> str:
        """Return why the engine does not support an optional field that is set."""
        if reason := self.entry.reasons.get(field):
            return f"engine.{field} is not for {self.name}, {reason}"
        supporting = engines_where(lambda entry: field in entry.fields)
        return f"engine.{field}={describe_value(getattr(self, field))} is for {supporting}, not for {self.name}"

    @model_validator(mode="after")
    def _engine_supports_the_passes(self) -> Self:
        mode = self.activation_checkpointing.mode
        if mode == "budget" and not self.compile:
            raise ValueError("activation_checkpointing.mode budget needs compile; without it, take selective")
        if mode == "selective" and self.compile:
            raise ValueError("activation_checkpointing.mode selective is not for compiled blocks; take budget, or full")
        if mode not in self.entry.checkpointing:
            supporting = engines_where(lambda entry: mode in entry.checkpointing)
            raise ValueError(f"activation_checkpointing.mode {mode} is for {supporting}, not for {self.name}")
        if self.precision not in {"auto", *self.entry.precisions}:
            supporting = engines_where(lambda entry: self.precision in entry.precisions)
            others = " or ".join(sorted(self.entry.precisions))
            raise ValueError(f"precision {self.precision} is for {supporting}, not for {self.name}; set it to {others}")
        return self

    @property
    def entry(self) -> EngineEntry:
        """Return what the engine declares."""
        return ENGINES.get(self.name)


_DERIVED_KEYS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch and train.micro_batch",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "zero_optimization.stage": "engine.name",
    "zero_optimization.offload_optimizer": "engine.offload",
}
"""Keys of DeepSpeed's config that follow from the recipe and cannot differ from it, with their fields."""


def check_ranks(config: EngineConfig, ranks: int) -> None:
    """Check that an engine can shard over a number of ranks.

    Raises:
        EngineError: it cannot.
    """
    if config.entry.needs_several_ranks and ranks == 1:
        raise EngineError(f"engine.name {config.name} needs several ranks, but this run has one; set launch.processes")
    if config.shards is not None and ranks % config.shards:
        raise EngineError(f"engine.shards is {config.shards}, which does not divide the {ranks} ranks of the run")
    check_context(config, ranks)


def check_context(config: EngineConfig, ranks: int) -> None:
    """Check that the context groups of an engine cover a number of ranks.

    Raises:
        EngineError: they do not.
    """
    if ranks % config.context:
        raise EngineError(f"engine.context is {config.context}, which does not divide {count(ranks, 'rank')}")


def remark_on_idle_ranks(config: EngineConfig, global_batch: int, micro_batch: int, ranks: int) -> str | None:
    """Return how many ranks would have no row of a global batch, and what to change; None if all have one."""
    passes, groups = -(-global_batch // micro_batch), ranks // config.context
    if groups <= passes:
        return None
    remedies = [
        "raise train.global_batch",
        *(["lower train.micro_batch"] if micro_batch > 1 else []),
        *(["let ranks share rows with engine.context"] if "context" in config.entry.fields else []),
    ]
    return (
        f"{(groups - passes) * config.context:,} of {ranks:,} ranks are idle: they only join the passes of the others, "
        f"since a global batch of {count(global_batch, 'row')} has {count(passes, 'micro-batch', 'micro-batches')}; "
        f"{', or '.join(remedies)}"
    )


def optimizer_mismatch(engine: EngineConfig, optimizer: OptimizerConfig) -> Mismatch | None:
    """Return why an engine does not support an optimizer; None if it does."""
    name, fields = optimizer.name, ("optimizer.name", "engine.name")
    if not engine.entry.holds_parameters_for(optimizer.entry):
        supporting = engines_where(lambda entry: entry.supports(optimizer.entry))
        return Mismatch(
            f"optimizer.name {name} works on whole matrices, which engine.name {engine.name} shards; it is for "
            f"{supporting}; set one of them, or the optimizer to adamw",
            fields,
        )
    if engine.entry.optimizers is not None and name not in engine.entry.optimizers:
        supporting = engines_where(lambda entry: entry.supports(optimizer.entry))
        supported = " or ".join(sorted(engine.entry.optimizers))
        return Mismatch(
            f"optimizer.name {name} is for engine.name {supporting}, not for {engine.name}; set the optimizer to "
            f"{supported}, or another engine",
            fields,
        )
    return None
