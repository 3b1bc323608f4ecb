"""Checkpoints that belong to no engine."""

from pretrain.checkpoint.format import (
    CheckpointError,
    InvalidCheckpointError,
    Metadata,
    read,
    read_metadata,
    verify,
)
from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "InvalidCheckpointError",
    "Metadata",
    "read",
    "read_metadata",
    "verify",
]
