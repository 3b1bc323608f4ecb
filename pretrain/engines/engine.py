"""The contract of every engine: it owns device, precision, sharding, accumulation and the optimizer step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self, get_args

import torch
from pydantic import BaseModel, Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from torch import Tensor

from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.rows import Ids
from pretrain.distributed.fragments import Fragment
from pretrain.engines.phases import RankStep

EngineName = Literal["ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"]


CheckpointingMode = Literal["none", "full", "selective", "budget"]


class CheckpointingConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What blocks keep of a forward pass; the rest is computed again in backward. A name alone is its mode.

    Bit for bit the same training, but for what compilation rounds.
    """

    mode: CheckpointingMode = "none"
    """What is computed again. none: nothing. full: all of a block, from its input, for a third more work. selective:
    what lies between matrix products and attention, whose outputs are kept. budget: what torch.compile finds the
    cheapest; needs engine.compile, with which selective does not go."""
    every: int = Field(default=1, ge=1)
    """Of full and selective: only every k-th block of a stack, its first among them."""
    stacks: tuple[str, ...] = ()
    """Of full and selective: only blocks of these stacks; [] is all. MEGABYTE has global and local, other models
    blocks."""
    budget: float = Field(default=0.5, ge=0, le=1)
    """Of budget: the share of a block's activations that is kept, of those that compiled blocks keep by themselves."""

    @model_validator(mode="before")
    @classmethod
    def _mode_alone(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"enum": list(get_args(CheckpointingMode))}, handler(core_schema)]}

    @field_validator("stacks", mode="before")
    @classmethod
    def _names_as_a_tuple(cls, value: Any) -> Any:
        """After the validator above, a list is no longer JSON's, which strict validation would take for a tuple."""
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _budget_is_of_all_blocks(self) -> Self:
        if self.mode == "budget" and (self.every > 1 or self.stacks):
            raise ValueError("mode budget is for all blocks, without every and stacks")
        return self


class EngineConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """How a model is held and updated."""

    name: EngineName = "ddp"
    """What each rank holds. ddp: everything; in one process there is no other rank to talk to. fsdp: a share of
    parameters, gradients and moments (PyTorch's FSDP2). hsdp: the same within groups of `shards` ranks, each of which
    holds all. zero1, zero2, zero3: DeepSpeed's stages: a share of masters and moments, of gradients too, of parameters
    too."""
    shards: int | None = Field(default=None, ge=1)
    """Of hsdp: ranks that hold one whole model between them; divides their number."""
    reshard_after_forward: bool = True
    """Of fsdp and hsdp: drop a block's gathered parameters after its forward pass, and gather them again for backward.
    Without it each rank holds the model in the precision of the passes, and communicates a third less."""
    offload: bool = False
    """Keep what the optimizer works on (masters, gradients, moments) in the host's memory. Not for ddp."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes CUDA where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Precision of parameters and activations in forward and backward passes. Masters, moments, accumulated gradients,
    sums over ranks and the loss are always fp32. auto is bf16 on a device that multiplies bf16 natively (CUDA of
    capability 8.0 or more, CPUs with AMX or AVX512_BF16), else fp32; a run keeps its first choice on every machine.
    fp8 is bf16 whose linear maps within blocks multiply in float8, scaled by tensor, through torchao; for CUDA of
    capability 8.9, for ddp, fsdp and hsdp, and faster only with `compile`."""
    activation_checkpointing: CheckpointingConfig = CheckpointingConfig()
    compile: bool = False
    """Compile each block with torch.compile. It takes a minute or more at the start, and on a CPU a C++ compiler; the
    gradient then differs by roundings. Not for zero3."""
    deepspeed: dict[str, Any] = {}
    """Of zero1, zero2 and zero3: further keys of DeepSpeed's own config, laid over what follows from the recipe."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        zero = self.name.startswith("zero")
        if self.shards is not None and self.name != "hsdp":
            raise ValueError(f"engine.shards ({self.shards}) is for hsdp, not for {self.name}")
        if self.offload and self.name == "ddp":
            raise ValueError("engine.offload is not for ddp, which holds everything on every rank")
        if zero and not self.reshard_after_forward:
            raise ValueError(f"engine.reshard_after_forward=false is for fsdp and hsdp, not for {self.name}")
        if self.compile and self.name == "zero3":
            raise ValueError("engine.compile is not for zero3, which gathers parameters from within a block's call")
        if self.deepspeed and not zero:
            raise ValueError(f"engine.deepspeed is for zero1, zero2 and zero3, not for {self.name}")
        for key, says in _SAID_ELSEWHERE.items():
            section, _, entry = key.rpartition(".")
            node = self.deepspeed.get(section, {}) if section else self.deepspeed
            if isinstance(node, dict) and entry in node:
                raise ValueError(f"engine.deepspeed has {key}, which {says} says")
        return self

    @model_validator(mode="after")
    def _ways_go_together(self) -> Self:
        mode = self.activation_checkpointing.mode
        if mode == "budget" and not self.compile:
            raise ValueError("activation_checkpointing.mode budget needs compile; without it, take selective")
        if mode == "selective" and self.compile:
            raise ValueError("activation_checkpointing.mode selective is not for compiled blocks; take budget, or full")
        if self.precision == "fp8" and self.name.startswith("zero"):
            raise ValueError(f"precision fp8 is for ddp, fsdp and hsdp, not for {self.name}; set it to bf16")
        return self


_SAID_ELSEWHERE = {
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
"""Keys of DeepSpeed's config that follow from the recipe and cannot differ from it, and what says them."""


class EngineError(Exception):
    """An engine cannot be had as asked."""


def check_ranks(config: EngineConfig, ranks: int) -> None:
    """Check that an engine can shard over a number of ranks.

    Raises:
        EngineError: it cannot.
    """
    if config.name.startswith("zero") and ranks == 1:
        raise EngineError(f"engine.name {config.name} needs several ranks, but this run has one; set launch.processes")
    if config.name == "hsdp" and config.shards is not None and ranks % config.shards:
        raise EngineError(f"engine.shards is {config.shards}, which does not divide the {ranks} ranks of the run")


class NonFiniteError(Exception):
    """A gradient is infinite or not a number. Parameters and optimizer are as they were before the step."""


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, over the whole global batch."""

    nats: float
    target_bytes: int
    gradient_norm: float
    """Before clipping."""
    ranks: list[RankStep] = field(compare=False)
    """What the step went to on each rank, by rank."""


class Engine(Protocol):
    """What each rank calls, all of them alike and in the same order."""

    device: torch.device
    dtype: torch.dtype
    """Of parameters and activations in forward and backward passes."""

    def begin(self) -> None:
        """Gives every parameter its first values: a function of seed and name, on any number of ranks."""

    def rehearse(self, rows: int) -> None:
        """Forward and backward of one micro-batch of `rows` made-up rows; changes nothing that training depends on.

        Finds in seconds what would otherwise fail at the first step.

        Raises:
            EngineError: there is too little memory.
        """

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        step: int,
        learning_rate: float,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches of the global batch.

        The gradient is that of the batch's nats divided by its target bytes, both counted over all ranks. What the
        model carries from each row goes to the same row of the next step.

        Args:
            before_update: called after the passes. Before it, no fragment changes.
        Raises:
            NonFiniteError: before any parameter is changed; on all ranks.
        """

    def nats(self, ids: Ids) -> Tensor:
        """Without gradient, dropout and memory: (rows, T) ids to (rows, T) fp32 nats on the CPU."""

    def forget(self) -> None:
        """Empties what the model carries: the next step's rows do not go on where the last step's ended."""

    def fragments(self) -> list[Fragment]:
        """What this rank holds of every master and moment, and of the memory of its rows of the global batch."""

    def owned_fragments(self) -> list[Fragment]:
        """Of these, this rank's part: what all ranks own is everything, each element once."""

    def counters(self) -> dict[str, int]:
        """The engine's few integers that a checkpoint keeps beside the fragments."""

    def restore(self, counters: dict[str, int]) -> None:
        """Takes up counters, after a checkpoint has been read into the fragments."""
