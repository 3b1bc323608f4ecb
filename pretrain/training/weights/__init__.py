"""Weights of runs, checkpoints and exports."""

from pretrain.training.weights.finding import (
    InitializeConfig,
    InitialWeights,
    find_checkpoint,
    find_initial_weights,
    is_checkpoint,
    model_changes,
    store_of,
    trained_card,
    trained_objective,
    trained_precision,
    trained_separators,
)

__all__ = [
    "InitialWeights",
    "InitializeConfig",
    "find_checkpoint",
    "find_initial_weights",
    "is_checkpoint",
    "model_changes",
    "store_of",
    "trained_card",
    "trained_objective",
    "trained_precision",
    "trained_separators",
]
