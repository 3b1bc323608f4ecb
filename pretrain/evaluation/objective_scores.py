"""Loss of an objective on a corpus: what it hides of each document is the same in every evaluation.

    document ─▶ rows of T ids, without overlap ─▶ Objective, numbered in the order of the corpus ─▶ nats of the targets

Bits per byte of causal models are made in windows.py and modes.py.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.corpus.corpus import Corpus
from data_pipeline.documents import Piece
from data_pipeline.stream.rows import Example, Ids
from data_pipeline.vocabulary import PADDING, SEPARATOR, count_bytes
from pretrain.evaluation.evaluate import Progress
from pretrain.evaluation.scores import EvaluationError, Score, in_units
from pretrain.objectives import Draws, Form, ObjectiveConfig, stacked

EVALUATION_SEED = -1
"""Seed of what is hidden in evaluations. No run has it."""

NumberedRow = tuple[int, Ids, bool]
"""Number of a row in the corpus, its ids without padding, and whether it begins a document."""


class Guessed(NamedTuple):
    """Losses of rows, and the bytes that the model finds likeliest there."""

    nats: Tensor
    """(rows, n) losses."""
    likeliest: Callable[[NDArray[np.bool_]], NDArray[np.integer]]
    """Function that returns the likeliest byte at each chosen place of the rows, row by row."""


NatsOf = Callable[[Ids, NDArray[np.number] | None], Tensor | Guessed]
"""Function that returns the (rows, n) nats of the ids of an example, given `Example.ids` and `Example.given`."""
ShareOfRank = Callable[[Iterator[list[NumberedRow]]], Iterator[tuple[list[NumberedRow], bool]]]
"""Function that yields the batches that a rank passes, and whether it counts each; see `share_of_rank`."""


def everything(batches: Iterator[list[NumberedRow]]) -> Iterator[tuple[list[NumberedRow], bool]]:
    """Yield the share of a process without other ranks."""
    return ((batch, True) for batch in batches)


def score_objective(
    nats_of: NatsOf,
    corpus: Corpus,
    objective: ObjectiveConfig,
    form: Form,
    rows: int,
    *,
    length: int,
    scored: Callable[[int], slice],
    progress: Progress = lambda done: None,
    share: ShareOfRank = everything,
) -> Score:
    """Return the loss of an objective over a corpus.

    Args:
        nats_of: the model.
        corpus: the corpus to score.
        objective: objective that trained the model.
        form: of its examples.
        rows: rows scored at once.
        length: ids of a row.
        scored: returns the positions that the model scores of a row of so many ids; no others count.
        progress: called with the bytes of the rows that were scored.
        share: yields this rank's share of the batches.

    Raises:
        EvaluationError: a loss is not finite, or too high.
    """
    total = Score()
    numbered = document_rows(corpus.pieces(), length)
    if objective.entry.reads_pairs:  # the rest of a document that is longer than a row is no pair
        numbered = (row for row in numbered if row[2])
    for batch, is_own in share(_batched(numbered, rows)):
        example = _example(batch, objective, form, length, scored)
        found = nats_of(example.ids, example.given)
        if is_own:
            total.add(_score(batch, example, found))
            progress(sum(int((ids < SEPARATOR).sum()) for _, ids, _ in batch))
    return total


def document_rows(pieces: Iterable[Piece], length: int) -> Iterator[NumberedRow]:
    """Yield the rows of each document in order: `length` ids each, and a separator at the end if there is room.

    Args:
        pieces: the documents in order, each in consecutive pieces.
        length: most ids of a row.
    """
    held, number, begins = b"", 0, True
    for piece in pieces:
        held += piece.content
        while len(held) >= length or (piece.ends and held):
            ids = np.frombuffer(held[:length], np.uint8).astype(np.int16)
            held = held[length:]
            if piece.ends and not held and len(ids) < length:
                ids = np.append(ids, np.int16(SEPARATOR))
            yield number, ids, begins
            number, begins = number + 1, False
        begins |= piece.ends


def _batched(numbered: Iterable[NumberedRow], rows: int) -> Iterator[list[NumberedRow]]:
    batch: list[NumberedRow] = []
    for row in numbered:
        batch.append(row)
        if len(batch) == rows:
            yield batch
            batch = []
    if batch:
        yield batch


def _example(
    batch: list[NumberedRow], objective: ObjectiveConfig, form: Form, length: int, scored: Callable[[int], slice]
) -> Example:
    show: Any = objective.entry.show
    shown = []
    for number, ids, _ in batch:
        row = np.full(length, PADDING, np.int16)
        row[: len(ids)] = ids
        shown.append(show(row, Draws(EVALUATION_SEED, number), form, objective))
    example = stacked(shown, form)
    counted = np.zeros_like(example.targets)
    for of_row, each in zip(counted, shown, strict=True):
        of_row[scored(len(each.ids))] = True
    return example._replace(targets=example.targets & counted)


def _score(batch: list[NumberedRow], example: Example, found: Tensor | Guessed) -> Score:
    nats = found.nats if isinstance(found, Guessed) else found
    try:
        units = in_units(nats.numpy()[example.targets])
    except ValueError as error:
        raise EvaluationError(f"the model's loss in row {batch[0][0]} is not a usable number: {error}") from error
    begun = sum(begins for _, _, begins in batch)
    likeliest = None
    if isinstance(found, Guessed):
        likeliest = int((found.likeliest(example.targets) == example.ids[example.targets]).sum())
    return Score(int(units.sum()), count_bytes(example.ids, example.targets), begun, likeliest)
