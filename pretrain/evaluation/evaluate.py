"""Score every byte of a corpus once.

The result is a sum of nats in whole units (scores.py), so it does not depend on how windows are batched.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.documents import Piece
from pretrain.distributed.context import group_of
from pretrain.evaluation.scores import Evaluation, GroupOf
from pretrain.evaluation.window_entropies import EntropyScorer, NatsOf, scorer_of
from pretrain.evaluation.windows import ScoredWindow, batched, document_windows, padded, windows_of
from pretrain.models import ByteModel
from pretrain.models.base import Memory

WHOLE_DOCUMENT = 1 << 62
"""Length of a window that holds any document."""
Progress = Callable[[int], None]
"""Callback with the number of bytes scored since the last call."""
Batches = Iterator[list[ScoredWindow]]
"""Windows that are passed at once, again and again."""
Share = tuple[list[ScoredWindow], bool]
"""Windows that a rank passes at once, and whether it counts their scores: each window counts on one rank."""
Scored = Iterator[tuple[list[ScoredWindow], Tensor]]
"""Windows that were passed at once, with the (rows, T) fp32 nats of their ids, again and again."""


def everything(batches: Batches) -> Iterator[Share]:
    """Yield the share of a process without other ranks."""
    return ((batch, True) for batch in batches)


def evaluate(
    nats_of: NatsOf | EntropyScorer,
    corpus: Corpus,
    sequence_length: int,
    rows: int,
    group_of: GroupOf = lambda key: "all",
    progress: Progress = lambda done: None,
    stride: int | None = None,
    *,
    after_separator: bool = False,
    share: Callable[[Batches], Iterator[Share]] = everything,
) -> Evaluation:
    """Score every byte of a corpus once, or this rank's share of it.

    Args:
        nats_of: the model.
        corpus: the corpus to score.
        sequence_length: most bytes of a window.
        rows: windows scored at once.
        group_of: maps a document's key to its group.
        progress: called with the bytes scored.
        stride: bytes scored at the end of a window; all of it if None. See `stride_of` for the stride of a model.
        after_separator: whether a separator, which is not scored, precedes each document.
        share: yields this rank's share of the windows; see `share_of_rank`.
    """
    evaluation = Evaluation()
    found = document_windows(corpus, sequence_length, stride, after_separator=after_separator)
    for windows, is_own in share(batched(_prepared(nats_of, found), rows)):
        nats = _nats(nats_of, windows)
        if is_own:
            progress(evaluation.add(windows, nats, group_of))
    return evaluation


def share_of_rank(batches: Batches, rank: int, world_size: int, context: int = 1) -> Iterator[Share]:
    """Yield the batches that a rank passes. All ranks have equally many, as sharded models require.

    In the last round a rank may pass a batch of another rank, which it does not count. The ranks of a context group
    pass the same batches, which the first of them counts.
    """
    group, groups = group_of(rank, world_size, context)
    while batch := list(islice(batches, groups)):
        has_own = group < len(batch)
        yield batch[group if has_own else 0], has_own and rank % context == 0


def score_windows(nats_of: NatsOf | EntropyScorer, windows: Iterable[ScoredWindow], rows: int) -> Scored:
    """Yield windows, `rows` at once, with the nats of their ids."""
    for batch in batched(_prepared(nats_of, windows), rows):
        yield batch, _nats(nats_of, batch)


def _prepared(nats_of: NatsOf | EntropyScorer, windows: Iterable[ScoredWindow]) -> Iterable[ScoredWindow]:
    return nats_of.prepared(windows) if isinstance(nats_of, EntropyScorer) else windows


def _nats(nats_of: NatsOf | EntropyScorer, windows: list[ScoredWindow]) -> Tensor:
    """Return the (rows, T) nats of windows."""
    return nats_of.nats(windows) if isinstance(nats_of, EntropyScorer) else nats_of(padded(windows))


def add_up(scored: Scored, group_of: GroupOf = lambda key: "all", progress: Progress = lambda done: None) -> Evaluation:
    """Return the sums over scored windows.

    Args:
        scored: the windows with their nats.
        group_of: maps a document's key to its group.
        progress: called with the bytes scored.
    """
    evaluation = Evaluation()
    for windows, nats in scored:
        progress(evaluation.add(windows, nats, group_of))
    return evaluation


def score_with_memory(model: ByteModel, pieces: Iterable[Piece], rows: int, *, after_separator: bool = False) -> Scored:
    """Yield the segments of each document in order, scored with the memory of earlier segments.

    `rows` documents are held in memory and scored side by side. A row ends with its document. The model carries memory.
    """
    device, length = next(model.parameters()).device, model.sequence_length
    for documents in batched(windows_of(pieces, WHOLE_DOCUMENT, after_separator=after_separator), rows):
        documents.sort(key=lambda document: -len(document.ids))
        memory: Memory = {}
        for start in range(0, len(documents[0].ids), length):
            segments = [
                replace(
                    document,
                    ids=document.ids[start : start + length],
                    offset=document.offset + start,
                    context=0 if start else document.context,
                )
                for document in documents
                if len(document.ids) > start
            ]
            ids = torch.from_numpy(padded(segments)).to(device)
            with torch.no_grad():
                memory = {name: tensor[: len(segments)] for name, tensor in memory.items()}
                nats, memory = model(ids, memory)
            yield segments, nats.cpu()


def scorer(model: ByteModel) -> NatsOf | EntropyScorer:
    """Return the forward pass of a model in the form that `evaluate` takes."""
    device = next(model.parameters()).device

    def nats_of(*arguments: NDArray[Any]) -> Tensor:
        with torch.no_grad():
            nats: Tensor = model(*(torch.from_numpy(array).to(device) for array in arguments))
            return nats.cpu()

    return scorer_of(model, nats_of, device)
