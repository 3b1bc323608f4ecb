"""Masked objective: hidden bytes from all other ids of the row, as BERT does (Devlin et al. 2019, section 3.1).

Of the bytes of a row, 15 % are targets. The model reads MASK in place of 80 % of these, a random byte in place of 10 %,
and the byte itself in 10 %. Separators and padding are never targets.
"""

import numpy as np

from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import SEPARATOR
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

MASK = FIRST_SPECIAL_ID
"""Id that a model reads in place of a hidden byte."""
MASKED, REPLACED = 0.8, 0.1
"""Shares of the targets that are read as MASK, and as a random byte."""


def show(row: Ids, draws: Draws, form: Form, config: ObjectiveConfig) -> Shown:
    """Return a row with a share of its bytes hidden; at least one byte, if there is any. See `Show`."""
    places = np.flatnonzero(row < SEPARATOR)
    hidden = places[draws.choose(len(places), min(len(places), max(1, round(config.share * len(places)))))]
    treatment, random_bytes = draws.uniform(len(hidden)), draws.below(SEPARATOR, len(hidden))
    read, targets = row.copy(), np.zeros(row.shape, np.bool_)
    targets[hidden] = True
    read[hidden[treatment < MASKED]] = MASK
    is_replaced = (treatment >= MASKED) & (treatment < MASKED + REPLACED)
    read[hidden[is_replaced]] = random_bytes[is_replaced]
    return Shown(row, targets, read)


register_objective(
    ObjectiveEntry(
        name="masked",
        show=show,
        unit="masked byte",
        visibilities=(Visibility.bidirectional,),
        fields=frozenset({"share"}),
        special_ids=lambda config, length: 1,
    )
)
