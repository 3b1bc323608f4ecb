"""Classification objective: the label of a document, which is one byte, from the whole document.

    pair of a source and a label ─▶ given: MASK, then the source; ids: the label, then padding; target: the label

The label precedes the document, and is hidden. A model that was trained on masked bytes therefore has all ids that it
needs. The hidden place is what BERT's first token is (Devlin et al. 2019): a state that reads the whole row.
"""

import numpy as np

from data_pipeline.errors import CorpusError
from data_pipeline.pairs import pair_of
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

HIDDEN = FIRST_SPECIAL_ID
"""Id that a model reads in place of the label. It is the mask of `masked`."""


def show(row: Ids, draws: Draws, form: Form, config: ObjectiveConfig) -> Shown:
    """Return the label of a row, and what is read: the mask and the source; a row of padding has neither. See `Show`.

    A row that ends before the label has no target.

    Raises:
        CorpusError: the row is no pair, or its label is not one byte.
    """
    empty = np.empty(0, np.int16)
    source, target = pair_of(row) if row[0] != PADDING else (empty, empty)
    label = target[target < SEPARATOR]
    if len(label) > 1 or (len(target) and not len(label)):
        shown = bytes(label[:20].astype(np.uint8))
        raise CorpusError(f"the label {shown!r} is not one byte, which objective.name classification reads")
    given = np.concatenate([[np.int16(HIDDEN)], source]) if len(label) else empty
    return Shown(label, np.ones(len(label), np.bool_), given)


register_objective(
    ObjectiveEntry(
        name="classification",
        show=show,
        unit="label byte",
        visibilities=(Visibility.bidirectional,),
        special_ids=lambda config, length: 1,
        reads_pairs=True,
        has_accuracy=True,
    )
)
