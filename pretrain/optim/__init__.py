"""Optimizers and learning-rate schedules. Importing this package registers Byteloom's own optimizers."""

from pretrain.optim import adamw, muon  # noqa: F401 they register themselves, in this order
from pretrain.optim.config import OptimizerConfig, optimizer_warnings
from pretrain.optim.groups import OptimizerError, build_optimizers
from pretrain.optim.registry import OPTIMIZERS, OptimizerEntry, register_optimizer
from pretrain.optim.schedules import ScheduleConfig, learning_rate_at, schedule_mismatch

__all__ = [
    "OPTIMIZERS",
    "OptimizerConfig",
    "OptimizerEntry",
    "OptimizerError",
    "ScheduleConfig",
    "build_optimizers",
    "learning_rate_at",
    "optimizer_warnings",
    "register_optimizer",
    "schedule_mismatch",
]
