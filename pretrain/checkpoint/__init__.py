"""Checkpoints that belong to no engine."""

from pretrain.checkpoint.data import described, read, read_metadata, verify
from pretrain.checkpoint.errors import CheckpointError, InvalidCheckpointError
from pretrain.checkpoint.format import Metadata, StoredTensor
from pretrain.checkpoint.home import Location, Url, locate
from pretrain.checkpoint.store import CheckpointConfig, CheckpointStore

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "InvalidCheckpointError",
    "Location",
    "Metadata",
    "StoredTensor",
    "Url",
    "described",
    "locate",
    "read",
    "read_metadata",
    "verify",
]
