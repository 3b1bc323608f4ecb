"""Engines, behind one protocol (engine.py)."""

from pretrain.engines.engine import Engine, EngineConfig, EngineError, NonFiniteError, StepResult
from pretrain.engines.pytorch import SingleProcessEngine, choose_device, compute_dtype

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineError",
    "NonFiniteError",
    "SingleProcessEngine",
    "StepResult",
    "choose_device",
    "compute_dtype",
]
