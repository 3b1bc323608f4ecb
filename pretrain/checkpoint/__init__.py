"""Checkpoints that belong to no engine.

Names are imported when they are first used: some need torch, which takes seconds, and others do not.
"""

import importlib
from typing import TYPE_CHECKING, Any

from byteloom.core.storage.locations import Location, Url, locate
from pretrain.checkpoint.errors import CheckpointError, InvalidCheckpointError, NotFiniteError

if TYPE_CHECKING:
    from pretrain.checkpoint.config import CheckpointConfig
    from pretrain.checkpoint.data import metadata_of_files, read_metadata, verify
    from pretrain.checkpoint.format import Metadata, StoredTensor
    from pretrain.checkpoint.loading import read
    from pretrain.checkpoint.store import CheckpointStore

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "InvalidCheckpointError",
    "Location",
    "Metadata",
    "NotFiniteError",
    "StoredTensor",
    "Url",
    "locate",
    "metadata_of_files",
    "read",
    "read_metadata",
    "verify",
]

_WITH_TORCH = {
    **dict.fromkeys(("metadata_of_files", "read_metadata", "verify"), "data"),
    **dict.fromkeys(("Metadata", "StoredTensor"), "format"),
    "CheckpointConfig": "config",
    "CheckpointStore": "store",
    "read": "loading",
}
"""The modules of names that are imported when they are first used."""


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
