"""Engines, behind one protocol (engine.py). Importing this package registers Byteloom's own engines."""

from pretrain.distributed.world import ALONE, World
from pretrain.engines import builtin  # noqa: F401 its engines register themselves
from pretrain.engines.base import choose_device
from pretrain.engines.config import (
    CheckpointingConfig,
    EngineConfig,
    check_context,
    check_ranks,
    optimizer_mismatch,
    remark_on_idle_ranks,
)
from pretrain.engines.engine import Engine, EngineError, NonFiniteError, RowLoss, StepResult, Upcoming, UpdateLimits
from pretrain.engines.phases import RankStep, peak_resident_bytes
from pretrain.engines.precision import (
    choose_precision,
    compute_dtype,
    gpu_precision,
    has_native_bf16,
    remark_on_precision,
    scoring_precision,
)
from pretrain.engines.registry import ENGINES, EngineEntry, StateSharding, register_engine
from pretrain.models.base import ByteModel
from pretrain.optim import OptimizerConfig

__all__ = [
    "ENGINES",
    "CheckpointingConfig",
    "Engine",
    "EngineConfig",
    "EngineEntry",
    "EngineError",
    "NonFiniteError",
    "RankStep",
    "RowLoss",
    "StateSharding",
    "StepResult",
    "Upcoming",
    "UpdateLimits",
    "build_engine",
    "check_context",
    "check_ranks",
    "choose_device",
    "choose_precision",
    "compute_dtype",
    "gpu_precision",
    "has_native_bf16",
    "optimizer_mismatch",
    "peak_resident_bytes",
    "register_engine",
    "remark_on_idle_ranks",
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
        EngineError: the engine does not run here, or not with this optimizer.
    """
    check_ranks(config, world.size)
    if mismatch := optimizer_mismatch(config, optimizer):
        raise EngineError(mismatch.text)
    builder = config.entry.load()
    return builder(config, model, optimizer, seed, world, global_batch=global_batch, micro_batch=micro_batch)
