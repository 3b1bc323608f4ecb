"""Environment of NCCL, which reads it when the ranks connect. What a user has set stays."""

import os
from pathlib import Path

TRACE = "nccl-rank-"
"""Prefix of the names of the files in the run folder to which ranks write their last collectives."""
TRACED_COLLECTIVES = 2000
"""Newest collectives that a rank remembers: several steps of a model with a hundred blocks."""


def set_up_nccl(folder: Path, *, deterministic: bool) -> None:
    """Have each rank write its last collectives to the run folder when one takes too long; pin algorithms if asked.

    Python's `torch.distributed.flight_recorder` analyses the files.

    Args:
        folder: of the run.
        deterministic: whether sums are added in the same order in each run.
    """
    settings = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": str(TRACED_COLLECTIVES),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(folder.absolute() / TRACE),
    }
    if deterministic:
        settings |= {"NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
