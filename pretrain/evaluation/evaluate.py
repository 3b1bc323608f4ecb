"""Score every byte of a corpus once.

The result is a sum of nats in whole units (scores.py), so it does not depend on how windows are batched.
"""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.stream.rows import Ids
from pretrain.evaluation.scores import Evaluation, GroupOf
from pretrain.evaluation.windows import ScoredWindow, batched, document_windows, padded
from pretrain.models import ByteModel
from pretrain.models.base import Memory

Progress = Callable[[int], None]
"""Callback with the number of bytes scored since the last call."""


def evaluate(
    nats_of: Callable[[Ids], Tensor],
    corpus: Corpus,
    sequence_length: int,
    rows: int,
    group_of: GroupOf = lambda key: "all",
    progress: Progress = lambda done: None,
    stride: int | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Evaluation:
    """Score every byte of a corpus once, or this rank's part of it.

    All ranks call `nats_of` equally often, as sharded models require.

    Args:
        nats_of: maps (rows, T) int16 ids, padded at the end, to (rows, T) fp32 nats on the CPU.
        corpus: the corpus to score.
        sequence_length: most bytes of a window.
        rows: windows scored at once.
        group_of: maps a document's key to its group.
        progress: called with the bytes scored.
        stride: bytes scored at the end of a window; all of it if None. See `stride_of` for the stride of a model.
        rank: rank of this process.
        world_size: number of ranks.
    """
    evaluation = Evaluation()
    batches = batched(document_windows(corpus, sequence_length, stride), rows)
    while batch := list(islice(batches, world_size)):
        if rank < len(batch):
            windows = batch[rank]
            progress(evaluation.add(windows, nats_of(padded(windows)), group_of))
        else:
            nats_of(padded(batch[0]))  # a batch of another rank
    return evaluation


def evaluate_with_memory(
    model: ByteModel,
    corpus: Corpus,
    rows: int,
    group_of: GroupOf = lambda key: "all",
    progress: Progress = lambda done: None,
) -> Evaluation:
    """Score every byte of a corpus once: segments of a document in order, with the memory of earlier segments.

    `rows` documents are held in memory and scored side by side. A row ends with its document. The model carries memory.
    """
    evaluation = Evaluation()
    device, length = next(model.parameters()).device, model.sequence_length
    for documents in batched(document_windows(corpus, corpus.raw_bytes), rows):
        documents.sort(key=lambda document: -len(document.ids))
        memory: Memory = {}
        for start in range(0, len(documents[0].ids), length):
            segments = [
                ScoredWindow(document.key, document.modality, document.ids[start : start + length], start, context=0)
                for document in documents
                if len(document.ids) > start
            ]
            ids = torch.from_numpy(padded(segments)).to(device)
            with torch.no_grad():
                memory = {name: tensor[: len(segments)] for name, tensor in memory.items()}
                nats, memory = model(ids, memory)
            progress(evaluation.add(segments, nats.cpu(), group_of))
    return evaluation


def scorer(model: ByteModel) -> Callable[[Ids], Tensor]:
    """Return the forward pass of a model in the form that `evaluate` takes."""
    device = next(model.parameters()).device

    def nats_of(ids: Ids) -> Tensor:
        with torch.no_grad():
            return model(torch.from_numpy(ids).to(device)).cpu()

    return nats_of
