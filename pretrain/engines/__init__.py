"""Engines, behind one protocol (engine.py)."""

from pretrain.distributed.world import ALONE, World
from pretrain.engines.base import choose_device
from pretrain.engines.engine import (
    CheckpointingConfig,
    Engine,
    EngineConfig,
    EngineError,
    NonFiniteError,
    StepResult,
    check_ranks,
)
from pretrain.engines.phases import RankStep, peak_memory_bytes
from pretrain.engines.precision import (
    choose_precision,
    compute_dtype,
    gpu_precision,
    has_native_bf16,
    remark_on_precision,
    scoring_precision,
)
from pretrain.models.base import ByteModel
from pretrain.optim.optimizers import OptimizerConfig

__all__ = [
    "CheckpointingConfig",
    "Engine",
    "EngineConfig",
    "EngineError",
    "NonFiniteError",
    "RankStep",
    "StepResult",
    "build_engine",
    "check_ranks",
    "choose_device",
    "choose_precision",
    "compute_dtype",
    "gpu_precision",
    "has_native_bf16",
    "peak_memory_bytes",
    "remark_on_precision",
    "scoring_precision",
]


def build_engine(
    config: EngineConfig,
    model: ByteModel,
    optimizer: OptimizerConfig,
    seed: int,
    world: World = ALONE,
    *,
    global_batch: int = 1,
    micro_batch: int = 1,
) -> Engine:
    """Return the engine of a config, with the model in it; arguments as of `BaseEngine`.

    Raises:
        EngineError: it cannot be had here.
    """
    check_ranks(config, world.size)
    sizes = {"global_batch": global_batch, "micro_batch": micro_batch}
    if config.name.startswith("zero"):
        from pretrain.engines.deepspeed import DeepSpeedEngine  # noqa: PLC0415 a library that few need

        return DeepSpeedEngine(config, model, optimizer, seed, world, **sizes)
    from pretrain.engines.pytorch import PyTorchEngine  # noqa: PLC0415 only training needs FSDP2

    return PyTorchEngine(config, model, optimizer, seed, world, **sizes)
