"""What can be wrong with a checkpoint."""


class CheckpointError(Exception):
    """A checkpoint cannot be used as asked."""


class InvalidCheckpointError(CheckpointError):
    """A checkpoint is damaged or incomplete."""
