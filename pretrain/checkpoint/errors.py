"""Errors of checkpoints."""

from byteloom.core.errors import CorrectableError


class CheckpointError(CorrectableError):
    """A checkpoint cannot be used as asked."""


class InvalidCheckpointError(CheckpointError):
    """A checkpoint is damaged or incomplete."""


class NotFiniteError(CheckpointError):
    """A run holds values that are NaN or infinite, so no checkpoint of it would be valid."""
