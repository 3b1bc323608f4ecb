"""Bits per byte of a model on every byte of a corpus.

Windowing: a window of at most the model's sequence length moves along each document, by `stride` bytes at a time, and
the new bytes at its end are scored, so each byte is scored once:

    document    ────────────────────────────────────────────────────────
    windows     [new]
                [    |new]
                [         |new]             until it is full, then
                     [         |new]        ...

With a stride of the sequence length, windows lie side by side and each is scored without context from before it. A
model that scores only the last N bytes of a window (Perceiver AR) takes a stride of N at most. Separators are not
read. The figure is the sum of nats over the sum of bytes, in float64, so it does not depend on how windows are batched.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from data_pipeline.shards import Corpus
from data_pipeline.stream import Ids
from data_pipeline.vocabulary import PADDING, count_bytes
from pretrain.models import ByteModel


class ValidationConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What is measured during a run beside the training loss."""

    shards: str | None = None
    """Corpus folder that training does not read; every byte of it is scored each time. None: no validation."""
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
    context: int
    """How many of them are read only: windows before this one have scored them."""
    begins_document: bool


def evaluate(
    nats_of: Callable[[Ids], Tensor],
    corpus: Corpus,
    sequence_length: int,
    rows: int,
    group_of: Callable[[str], str] = lambda key: "all",
    progress: Callable[[int], None] = lambda done: None,
    stride: int | None = None,
) -> Evaluation:
    """Scores every byte of a corpus once.

    Args:
        nats_of: (rows, T) int16 ids, padded at the end of rows, to (rows, T) fp32 nats on the CPU.
        rows: windows scored at once.
        group_of: the group that a document's key belongs to.
        progress: called with the number of bytes scored since the last call.
        stride: bytes scored at the end of a window; all of it if None. `stride_of` gives a model's own.
    """
    evaluation = Evaluation()
    for windows in _batched(document_windows(corpus, sequence_length, stride), rows):
        length = max(len(window.ids) for window in windows)
        ids = np.full((len(windows), length), PADDING, np.int16)
        for row, window in zip(ids, windows, strict=True):
            row[: len(window.ids)] = window.ids
        targets = ids != PADDING
        for target, window in zip(targets, windows, strict=True):
            target[: window.context] = False
        nats = nats_of(ids).double().numpy()
        for price, own, target, window in zip(nats, ids, targets, windows, strict=True):
            score = Score(float(price[target].sum()), count_bytes(own, target), int(window.begins_document))
            evaluation.groups.setdefault(group_of(window.key), Score()).add(score)
        progress(count_bytes(ids, targets))
    return evaluation


def stride_of(model: ByteModel) -> int:
    """The largest stride at which a model scores every byte: how many it scores at the end of a full window."""
    return len(range(model.sequence_length)[model.scored(model.sequence_length)])


def scorer(model: ByteModel) -> Callable[[Ids], Tensor]:
    """A model's forward pass in the form `evaluate` asks for."""
    device = next(model.parameters()).device

    def nats_of(ids: Ids) -> Tensor:
        with torch.no_grad():
            return model(torch.from_numpy(ids).to(device)).cpu()

    return nats_of


def document_windows(corpus: Corpus, length: int, stride: int | None = None) -> Iterator[Window]:
    """Each document's windows of at most `length` bytes, in order; the last one scores as few as are left."""
    stride = stride or length
    data, scored = b"", 0  # of the document under way: bytes held, and how many of them are scored
    for number in range(len(corpus)):
        block = corpus.read(number)
        for part in block.slices:
            offset = part.document_offset - len(data)
            data += block.raw[part.start : part.start + part.length]
            while len(data) - scored >= (1 if part.ends else stride):
                begin, end = max(0, scored + stride - length), min(scored + stride, len(data))
                ids = np.frombuffer(data[begin:end], np.uint8).astype(np.int16)
                yield Window(part.key, ids, scored - begin, begins_document=offset + scored == 0)
                scored = end
            if part.ends:
                data, scored = b"", 0
            else:
                begin = max(0, scored + stride - length)
                data, scored = data[begin:], scored - begin


def _batched(windows: Iterable[Window], rows: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in windows:
        batch.append(window)
        if len(batch) == rows:
            yield batch
            batch = []
    if batch:
        yield batch
