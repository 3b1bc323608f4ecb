"""Prefix objective: the rest of a row from a prefix whose ids all see each other (Raffel et al. 2020, section 3.2.1).

The length of the prefix is drawn for each row, from one id to all but one. The loss is that of the rest.
"""

import numpy as np

from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import PADDING
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.draws import Draws
from pretrain.objectives.registry import Form, ObjectiveEntry, Shown, Visibility, register_objective


def show(row: Ids, draws: Draws, form: Form, config: ObjectiveConfig) -> Shown:
    """Return a row with the length of its prefix; see `Show`."""
    (known,) = np.nonzero(row != PADDING)
    length = int(known[-1]) + 1 if len(known) else 0
    prefix = 1 + draws.below(length - 1, 1).item() if length > 1 else 0
    targets = row != PADDING
    targets[:prefix] = False
    return Shown(row, targets, prefix)


register_objective(
    ObjectiveEntry(name="prefix", show=show, unit="suffix byte", visibilities=(Visibility.prefix,)),
)
