"""Staging: micro-batches on their way to the device, one ahead of the pass that needs them.

Rows: bytes, separators, padding ─▶ one copy ─▶ (rows, T) int16 ids, widened on the device
Example: ids, given ids        ─▶ one copy ─▶ the same
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.stream.loader import MicroBatch
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.distributed.transfers import Sent, Transfers


@dataclass(frozen=True)
class StagedBatch:
    """Micro-batch on the device."""

    ids: Tensor
    """(rows, n) int16 ids that are predicted."""
    targets: Tensor
    """(rows, n) positions that count in the loss."""
    sources: Tensor | None
    """(rows,) number of each row's source; None without sources."""
    given: Tensor | None = None
    """Second argument of the forward pass; see `Example.given`."""


def stage(
    transfers: Transfers,
    micro_batches: Sequence[MicroBatch],
    scored: Sequence[NDArray[np.bool_]],
    sources: Sequence[NDArray[np.int64]] | None,
) -> Iterator[StagedBatch]:
    """Yield micro-batches on the device. The next one is sent before the current one is used.

    Args:
        transfers: copies to the device.
        micro_batches: of this rank.
        scored: (rows, T) positions that count in the loss, by micro-batch.
        sources: (rows,) number of each row's source, by micro-batch; None without sources.
    """

    def send(number: int) -> Sent:
        rows, example = micro_batches[number].rows, micro_batches[number].example
        own = [] if sources is None else [sources[number]]
        arrays: list[NDArray[Any] | None]
        if example is None:
            arrays = [scored[number], *own, rows.bytes, rows.separators, rows.padding]
        else:
            arrays = [scored[number], *own, example.ids, example.given]
        return transfers.send(*(array for array in arrays if array is not None))

    sent = send(0) if micro_batches else None
    for number in range(len(micro_batches)):
        assert sent is not None
        targets, *rest = sent.take()
        sent = send(number + 1) if number + 1 < len(micro_batches) else None
        of_rows = None if sources is None else rest.pop(0)
        if micro_batches[number].example is None:
            content, separators, *padding = rest
            yield StagedBatch(widened(content, separators, padding[0] if padding else None), targets, of_rows)
        else:
            ids, *given = rest
            yield StagedBatch(ids, targets, of_rows, given[0] if given else None)


def widened(content: Tensor, separators: Tensor, padding: Tensor | None) -> Tensor:
    """Return (rows, T) int16 ids, from `Rows` as tensors on one device."""
    ids = content.to(torch.int16, memory_format=torch.contiguous_format)
    ids.view(-1).index_fill_(0, separators, SEPARATOR)
    return ids if padding is None else ids.masked_fill_(padding, PADDING)
