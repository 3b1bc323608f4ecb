"""Byteloom's own engines, and what each supports. Their libraries are imported when an engine is built."""

from dataclasses import replace

from pretrain.engines.registry import EngineBuilder, EngineEntry, StateSharding, register_engine

REPLICATED = StateSharding("ddp")
SHARDED_OPTIMIZER = StateSharding("zero-1", optimizer=True, copies_weights=True)
SHARDED_GRADIENTS = StateSharding("zero-2", gradients=True, optimizer=True, copies_weights=True)
SHARDED_COPIES = StateSharding("zero-3", weights=True, gradients=True, optimizer=True, copies_weights=True)
FULLY_SHARDED = StateSharding("fsdp", weights=True, gradients=True, optimizer=True, sums_in_last_pass=True)
SHARDED_IN_GROUPS = replace(FULLY_SHARDED, label="hsdp", within_groups=True)
ALL_CHECKPOINTING = frozenset({"none", "full", "selective", "budget"})


def _load_pytorch() -> EngineBuilder:
    from pretrain.engines.pytorch import PyTorchEngine  # noqa: PLC0415 only training needs FSDP2

    return PyTorchEngine


def _load_deepspeed() -> EngineBuilder:
    from pretrain.engines.deepspeed import DeepSpeedEngine  # noqa: PLC0415 a library that few need

    return DeepSpeedEngine


def _pytorch(name: str, sharding: StateSharding, *fields: str, **reasons: str) -> None:
    register_engine(
        EngineEntry(
            name=name,
            load=_load_pytorch,
            sharding=sharding,
            precisions=frozenset({"fp32", "bf16", "fp8"}),
            checkpointing=ALL_CHECKPOINTING,
            fields=frozenset({"compile", "context", *fields}),
            reasons=reasons,
            whole_parameters=not sharding.weights,
            dtensors=sharding.weights,
        )
    )


def _deepspeed(name: str, sharding: StateSharding, *fields: str, **reasons: str) -> None:
    register_engine(
        EngineEntry(
            name=name,
            load=_load_deepspeed,
            sharding=sharding,
            precisions=frozenset({"fp32", "bf16"}),
            checkpointing=ALL_CHECKPOINTING,
            fields=frozenset({"offload", "deepspeed", *fields}),
            reasons=reasons,
            optimizers=frozenset({"adamw", "adam"}),
            needs_several_ranks=True,
            package="deepspeed",
        )
    )


_pytorch("ddp", REPLICATED, offload="which holds everything on every rank")
_pytorch("fsdp", FULLY_SHARDED, "offload", "reshard_after_forward")
_pytorch("hsdp", SHARDED_IN_GROUPS, "shards", "offload", "reshard_after_forward")
_deepspeed("zero1", SHARDED_OPTIMIZER, "compile")
_deepspeed("zero2", SHARDED_GRADIENTS, "compile")
_deepspeed("zero3", SHARDED_COPIES, compile="which gathers parameters from within a block's call")
