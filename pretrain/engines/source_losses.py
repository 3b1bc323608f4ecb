"""Loss of a step by source of a mixture."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.stream.loader import MicroBatch
from data_pipeline.stream.mixture import RowSources
from data_pipeline.vocabulary import count_bytes_by_row


class SourceLosses:
    """Sums of nats and of target bytes by source, of one rank's rows.

    Args:
        sources: sources of the rows of each micro-batch; None counts nothing.
        micro_batches: of this rank.
        scored: (rows, T) positions that count, by micro-batch.
        device: device of the nats.
    """

    def __init__(
        self,
        sources: RowSources | None,
        micro_batches: Sequence[MicroBatch],
        scored: Sequence[NDArray[np.bool_]],
        device: torch.device,
    ) -> None:
        total = 0 if sources is None else sources.total
        self.of_rows = None if sources is None else sources.of_rows
        """(rows,) source of each row, by micro-batch."""
        self.nats = torch.zeros(total, dtype=torch.float64, device=device)
        """(sources,) nats of the rows that were added."""
        self.bytes = np.zeros(total, np.int64)
        """(sources,) target bytes of all rows."""
        for rows, micro_batch, targets in zip(self.of_rows or (), micro_batches, scored, strict=False):
            np.add.at(self.bytes, rows, count_bytes_by_row(micro_batch.ids, targets))

    def add(self, sources: Tensor | None, nats: Tensor) -> None:
        """Add a micro-batch.

        Args:
            sources: (rows,) source of each row, on the device; None counts nothing.
            nats: (rows, T) nats of positions that count; 0 elsewhere.
        """
        if sources is not None:
            self.nats.index_add_(0, sources, nats.detach().sum(1).double())


def summed(numbers: Sequence[Sequence[float]], sharing: int = 1) -> list[tuple[float, int]]:
    """Return the nats and the bytes of each source over all ranks.

    Args:
        numbers: nats, then bytes, of each source by rank.
        sharing: ranks that share each row; each counts all of its bytes.
    """
    nats, number_of_bytes = np.array(numbers, np.float64).reshape(len(numbers), 2, -1).sum(0)
    return list(zip(nats.tolist(), (number_of_bytes.astype(np.int64) // sharing).tolist(), strict=True))
