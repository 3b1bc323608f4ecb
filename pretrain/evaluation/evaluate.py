"""Score every byte of a corpus once.

The result is a sum of nats in whole units (scores.py), so it does not depend on how windows are batched.
"""

from collections.abc import Callable
from itertools import islice

import torch
from torch import Tensor

from data_pipeline.corpus.shards import Corpus
from data_pipeline.stream.rows import Ids
from pretrain.evaluation.scores import Evaluation, GroupOf
from pretrain.evaluation.windows import ScoredWindow, batched, document_windows, padded
from pretrain.models import ByteModel
from pretrain.models.base import Memory
from pretrain.models.families.transformer_xl import TransformerXL

Progress = Callable[[int], None]
"""Called with the number of bytes scored since the last call."""


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
    """Scores every byte of a corpus once, or this rank's part of them.

    Args:
        nats_of: (rows, T) int16 ids, padded at the end of rows, to (rows, T) fp32 nats on the CPU.
        rows: windows scored at once.
        stride: bytes scored at the end of a window; all of it if None. `stride_of` gives a model's own.
        rank, world_size: who calls this, of how many. All call `nats_of` equally often, as sharded models need it.
    """
    evaluation = Evaluation()
    batches = batched(document_windows(corpus, sequence_length, stride), rows)
    while batch := list(islice(batches, world_size)):
        if rank < len(batch):
            windows = batch[rank]
            progress(evaluation.add(windows, nats_of(padded(windows)), group_of))
        else:
            nats_of(padded(batch[0]))  # another rank's
    return evaluation


def evaluate_with_memory(
    model: TransformerXL,
    corpus: Corpus,
    rows: int,
    group_of: GroupOf = lambda key: "all",
    progress: Progress = lambda done: None,
) -> Evaluation:
    """Scores every byte of a corpus once, each document's segments in order with the memory of those before.

    As many documents as `rows` are held in memory and go side by side; a row ends with its document.
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
                nats, memory = model.forward_segment(ids, memory)
            progress(evaluation.add(segments, nats.cpu(), group_of))
    return evaluation


def scorer(model: ByteModel) -> Callable[[Ids], Tensor]:
    """A model's forward pass in the form `evaluate` asks for."""
    device = next(model.parameters()).device

    def nats_of(ids: Ids) -> Tensor:
        with torch.no_grad():
            return model(torch.from_numpy(ids).to(device)).cpu()

    return nats_of
