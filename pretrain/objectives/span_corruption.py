"""Span corruption: spans of a row from the rest of it, for an encoder with a decoder.

It is T5's objective (Raffel et al. 2020, section 3.1.4) with ByT5's spans of 20 bytes (Xue et al. 2022). Each span is
replaced by a sentinel in the source. The target is each sentinel followed by its span, and then a separator:

    row      a b c d e f g h
    source   a b S0 e f S1 h
    target   S0 c d S1 g |

15 % of the ids are in spans. The number of spans is that share divided by the mean length. The lengths of spans, and of
what lies between them, are random: all ways to cut are equally likely. The last id of a row is in a span, if there is
room for one, as in T5's code.
"""

import numpy as np
from numpy.typing import NDArray

from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.draws import Draws
from pretrain.objectives.registry import (
    FIRST_SPECIAL_ID,
    Form,
    ObjectiveEntry,
    Shown,
    Visibility,
    register_objective,
)


def hidden_and_spans(config: ObjectiveConfig, length: int) -> tuple[int, int]:
    """Return how many of so many ids are hidden, and in how many spans; no id if there is but one."""
    if length < 2:
        return 0, 0
    hidden = min(max(round(config.share * length), 1), length - 1)
    return hidden, min(max(round(hidden / config.span_length), 1), length - hidden)


def lengths(config: ObjectiveConfig, length: int) -> tuple[int, int]:
    """Return the ids of the target, and those of the source, for a row of so many ids."""
    hidden, spans = hidden_and_spans(config, length)
    return hidden + spans + 1, length - hidden + spans


def show(row: Ids, draws: Draws, form: Form, config: ObjectiveConfig) -> Shown:
    """Return the spans of a row, and the row with sentinels in their places; see `Show`."""
    row = row[row != PADDING]
    hidden, spans = hidden_and_spans(config, len(row))
    if not spans:
        nothing = np.empty(0, np.int16)
        return Shown(nothing, np.empty(0, np.bool_), row)
    kept_parts = np.split(np.arange(len(row) - hidden), _cuts(draws, len(row) - hidden, spans))
    hidden_parts = np.split(np.arange(hidden), _cuts(draws, hidden, spans))
    source, target, place = [], [], 0
    for number, (kept, own) in enumerate(zip(kept_parts, hidden_parts, strict=True)):
        sentinel = np.array([FIRST_SPECIAL_ID + number], np.int16)
        source += [row[place : place + len(kept)], sentinel]
        place += len(kept)
        target += [sentinel, row[place : place + len(own)]]
        place += len(own)
    ids = np.concatenate([*target, np.array([SEPARATOR], np.int16)])
    return Shown(ids, np.ones(len(ids), np.bool_), np.concatenate(source))


def _cuts(draws: Draws, length: int, parts: int) -> NDArray[np.int64]:
    """Return where a sequence is cut into parts of at least one id."""
    return 1 + draws.choose(length - 1, parts - 1)


register_objective(
    ObjectiveEntry(
        name="span_corruption",
        show=show,
        unit="hidden byte",
        visibilities=(Visibility.encoder_decoder,),
        fields=frozenset({"share", "span_length"}),
        special_ids=lambda config, length: hidden_and_spans(config, length)[1],
        lengths=lengths,
    )
)
