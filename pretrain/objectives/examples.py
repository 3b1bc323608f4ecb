"""Rows of a micro-batch as the objective shows them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.stream.loader import ShowRows
from data_pipeline.stream.rows import Example, Ids, Rows
from data_pipeline.vocabulary import PADDING
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.draws import Draws
from pretrain.objectives.registry import Form, Shown, Visibility


def show_rows(config: ObjectiveConfig, form: Form, seed: int) -> ShowRows | None:
    """Return the function that shows the rows of a run; None if rows are examples as they are.

    Args:
        config: of the objective.
        form: of the examples.
        seed: of the run.
    """
    show = config.entry.show
    if show is None:
        return None

    def show_all(rows: Rows, sequences: NDArray[np.int64]) -> Example:
        numbered = zip(rows.ids, sequences.tolist(), strict=True)
        return stacked([show(row, Draws(seed, number), form, config) for row, number in numbered], form)

    return show_all


def show_entropies(rows: Rows, sequences: NDArray[np.int64]) -> Example:
    """Return rows that are predicted as they are, with their entropies."""
    targets = np.ones(rows.bytes.shape, np.bool_) if rows.padding is None else ~rows.padding
    return Example(rows.ids, targets, rows.entropies)


def stacked(shown: Sequence[Shown], form: Form) -> Example:
    """Return rows as one example, padded to the form."""
    ids = _padded([row.ids for row in shown], form.length)
    targets = np.zeros(ids.shape, np.bool_)
    for row, of_row in zip(targets, shown, strict=True):
        row[: len(of_row.targets)] = of_row.targets
    if form.visibility is Visibility.causal:
        return Example(ids, targets, None)
    if form.visibility is Visibility.prefix:
        return Example(ids, targets, np.array([row.given for row in shown], np.int64))
    length = form.length if form.visibility is Visibility.bidirectional else form.source_length
    return Example(ids, targets, _padded([np.asarray(row.given) for row in shown], length))


def _padded(rows: Sequence[Ids], length: int) -> Ids:
    padded = np.full((len(rows), length), PADDING, np.int16)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded
