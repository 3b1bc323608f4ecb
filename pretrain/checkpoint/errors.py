"""Errors of checkpoints."""


class CheckpointError(Exception):
    """A checkpoint cannot be used as asked."""


class InvalidCheckpointError(CheckpointError):
    """A checkpoint is damaged or incomplete."""
