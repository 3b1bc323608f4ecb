"""Entropies of the windows of documents, for models that read those beside their corpora in training.

    windows of a document, in order ─▶ EntropyScorer.prepared ─▶ windows with what comes before them
                                                                 └─▶ EntropyScorer.nats ─▶ (rows, T) nats

A document that is evaluated has none beside it, so the model of bytes finds them, by the rule of those that are stored.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import SEPARATOR
from pretrain.evaluation.windows import ScoredWindow, padded
from pretrain.models import ByteModel
from pretrain.models.document_entropies import ContextPart, ContextRule, ContextTracker, entropies_of
from pretrain.models.entropy_model import EntropyModel
from pretrain.models.patching.entropy import Entropy

NatsOf = Callable[..., Tensor]
"""Function from (rows, T) int16 ids, padded at the end, to (rows, T) fp32 nats on the CPU. That of a model that reads
entropies takes those of the ids as a second argument."""


class EntropyScorer:
    """Scorer of windows for a model that reads entropies."""

    def __init__(self, nats_of: NatsOf, byte_model: EntropyModel, device: torch.device) -> None:
        """Keep the function of a model, and the model of bytes that decides where its patches start, on a device."""
        self._nats_of, self._byte_model, self._device = nats_of, byte_model, device

    def prepared(self, windows: Iterable[ScoredWindow]) -> Iterator[ScoredWindow]:
        """Yield the windows of documents, in order, with what comes before them. Windows that have it do not change."""
        tracker, before = ContextTracker(ContextRule.of(self._byte_model)), None
        for window in windows:
            if window.part is not None:
                yield window
                continue
            if before is None or window.begins_document:
                tracker = ContextTracker(ContextRule.of(self._byte_model))
            else:
                tracker.add(_of_document(before.ids[: window.offset - before.offset]))
            yield replace(window, part=tracker.peek(_of_document(window.ids)))
            before = window

    def part_of(self, ids: Ids, begin: int, end: int) -> ContextPart:
        """Return the bytes of a window of a document with what comes before them."""
        tracker = ContextTracker(ContextRule.of(self._byte_model))
        tracker.add(_of_document(ids[:begin]))
        return tracker.peek(_of_document(ids[begin:end]))

    def nats(self, windows: Sequence[ScoredWindow]) -> Tensor:
        """Return the (rows, T) nats of prepared windows."""
        parts = [window.part for window in windows if window.part is not None]
        ids = padded(windows)
        entropies = np.zeros(ids.shape, np.float16)
        found = entropies_of(self._byte_model, parts, self._device)
        for row, window, own in zip(entropies, windows, found, strict=True):
            row[len(window.ids) - len(own) : len(window.ids)] = own
        return self._nats_of(ids, entropies)


def scorer_of(model: ByteModel, nats_of: NatsOf, device: torch.device) -> "NatsOf | EntropyScorer":
    """Return a function of a model, or a scorer around it if the model reads entropies beside its corpora.

    Args:
        model: the model.
        nats_of: its function.
        device: of its parameters.
    """
    patcher = next(iter(model.patchers().values()), None)
    if not isinstance(patcher, Entropy) or patcher.config.entropies != "corpus":
        return nats_of
    assert isinstance(patcher.model, EntropyModel)
    return EntropyScorer(nats_of, patcher.model, device)


def _of_document(ids: Ids) -> Ids:
    """Return ids without the separator before their document."""
    return ids[1:] if len(ids) and ids[0] == SEPARATOR else ids
