"""Bits per byte of a model on every byte of a corpus.

Windowing: each document is cut into windows of the model's sequence length from its beginning, and each window is
scored without context from before it. Separators are not read. The figure is the sum of nats over the sum of bytes, in
float64, so it does not depend on how windows are batched.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from data_pipeline.shards import Corpus
from data_pipeline.rows import Ids
from data_pipeline.vocabulary import PADDING, count_bytes
from pretrain.models import ByteModel

BLOCKS_AHEAD = 7
"""Of a corpus at a URL: blocks that one request brings, beside the one that is read."""


class ValidationConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What is measured during a run beside the training loss."""

    shards: str | None = None
    """Corpus (folder or URL) that training does not read; every byte of it is scored each time. None: no validation."""
    every: int = Field(default=500, ge=1)
    """Steps between validations; there is one before the first step and one after the last as well."""


@dataclass
class Score:
    """Sums over documents."""

    nats: float = 0.0
    bytes: int = 0
    documents: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)

    def add(self, other: "Score") -> None:
        self.nats += other.nats
        self.bytes += other.bytes
        self.documents += other.documents


@dataclass
class Evaluation:
    groups: dict[str, Score] = field(default_factory=dict)

    @property
    def total(self) -> Score:
        total = Score()
        for score in self.groups.values():
            total.add(score)
        return total


@dataclass(frozen=True)
class Window:
    key: str
    """Of its document."""
    ids: Ids
    begins_document: bool


def evaluate(
    nats_of: Callable[[Ids], Tensor],
    corpus: Corpus,
    sequence_length: int,
    rows: int,
    group_of: Callable[[str], str] = lambda key: "all",
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Scores every byte of a corpus once.

    Args:
        nats_of: (rows, T) int16 ids to (rows, T) fp32 nats on the CPU.
        rows: windows scored at once.
        group_of: the group that a document's key belongs to.
        progress: called with the number of bytes scored since the last call.
    """
    evaluation = Evaluation()
    for windows in _batched(document_windows(corpus, sequence_length), rows):
        length = max(len(window.ids) for window in windows)
        ids = np.full((len(windows), length), PADDING, np.int16)
        for row, window in zip(ids, windows, strict=True):
            row[: len(window.ids)] = window.ids
        targets = ids != PADDING
        nats = nats_of(ids).double().numpy()
        for price, own, target, window in zip(nats, ids, targets, windows, strict=True):
            score = Score(float(price[target].sum()), count_bytes(own, target), int(window.begins_document))
            evaluation.groups.setdefault(group_of(window.key), Score()).add(score)
        progress(count_bytes(ids, targets))
    return evaluation


def scorer(model: ByteModel) -> Callable[[Ids], Tensor]:
    """A model's forward pass in the form `evaluate` asks for."""
    device = next(model.parameters()).device

    def nats_of(ids: Ids) -> Tensor:
        with torch.no_grad():
            return model(torch.from_numpy(ids).to(device)).cpu()

    return nats_of


def document_windows(corpus: Corpus, length: int) -> Iterator[Window]:
    """Each document's bytes in windows of `length`, the last of a document as short as it comes out.

    Withdrawn documents are left out.
    """
    withdrawn = {entry.key for entry in corpus.withdrawn}
    left = b""
    for number in range(len(corpus)):
        block = corpus.read(number, through=number + BLOCKS_AHEAD)
        for part in block.slices:
            if part.key in withdrawn:
                continue
            data = left + block.content[part.start : part.start + part.length]
            offset = part.document_offset - len(left)
            whole = len(data) if part.ends else len(data) // length * length
            for start in range(0, whole, length):
                ids = np.frombuffer(data[start : start + length], np.uint8).astype(np.int16)
                yield Window(part.key, ids, begins_document=offset + start == 0)
            left = data[whole:]


def _batched(windows: Iterable[Window], rows: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in windows:
        batch.append(window)
        if len(batch) == rows:
            yield batch
            batch = []
    if batch:
        yield batch
