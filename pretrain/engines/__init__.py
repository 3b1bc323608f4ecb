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


def build_engine(config: EngineConfig, model: ByteModel, optimizer: OptimizerConfig, seed: int) -> Engine:
    """The engine of a config, with the model in it.

    Raises:
        EngineError: it cannot be had here.
    """
    return SingleProcessEngine(config, model, optimizer, seed)
