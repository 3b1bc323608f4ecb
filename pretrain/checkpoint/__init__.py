"""Checkpoints that belong to no engine."""

from pretrain.checkpoint.format import (
    CheckpointError,
    Chunk,
    InvalidCheckpointError,
    Metadata,
    StoredTensor,
    read,
    read_metadata,
    verify,
)
from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "Chunk",
    "InvalidCheckpointError",
    "Metadata",
    "StoredTensor",
    "read",
    "read_metadata",
    "verify",
]
