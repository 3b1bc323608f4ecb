"""Engines, behind one protocol (engine.py)."""

from pretrain.engines.engine import Engine, EngineConfig, EngineError, NonFiniteError, StepResult
from pretrain.engines.pytorch import SingleProcessEngine, choose_device, compute_dtype
from pretrain.models.byte_model import ByteModel
from pretrain.optimizers import OptimizerConfig

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineError",
    "NonFiniteError",
    "StepResult",
    "build_engine",
    "choose_device",
    "compute_dtype",
]


def build_engine(
    config: EngineConfig,
    model: ByteModel,
    optimizer: OptimizerConfig,
    seed: int,
    *,
    global_batch: int = 1,
    micro_batch: int = 1,
) -> Engine:
    """The engine of a config, with the model in it.

    Args:
        global_batch, micro_batch: sequences of each, for a model that carries memory: it has one for every row.

    Raises:
        EngineError: it cannot be had here.
    """
    return SingleProcessEngine(config, model, optimizer, seed, global_batch=global_batch, micro_batch=micro_batch)
