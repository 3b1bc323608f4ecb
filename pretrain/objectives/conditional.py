"""Conditional objective: the target of a pair from its source. The loss is that of the target alone.

An encoder with a decoder reads the source in the encoder. A causal model reads source, separator, target, separator.
Each row is a document that `data_pipeline.pairs` made. A source or a target that is longer than the model's length is
cut at its end, as `data.documents: cut` cuts documents.
"""

import numpy as np

from data_pipeline.pairs import pair_of
from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import PADDING, SEPARATOR
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.draws import Draws
from pretrain.objectives.registry import Form, ObjectiveEntry, Shown, Visibility, register_objective


def show(row: Ids, draws: Draws, form: Form, config: ObjectiveConfig) -> Shown:
    """Return the target of a row, and its source; a row of padding alone has none. See `Show`.

    Raises:
        CorpusError: the row is no pair.
    """
    nothing = np.empty(0, np.int16)
    source, target = pair_of(row) if row[0] != PADDING else (nothing, nothing)
    if form.visibility is Visibility.encoder_decoder:
        target = target[: form.length]
        return Shown(target, target != PADDING, source[: form.source_length])
    both = np.concatenate([source, [np.int16(SEPARATOR)], target])[: form.length]
    return Shown(both, np.arange(len(both)) > len(source))


register_objective(
    ObjectiveEntry(
        name="conditional",
        show=show,
        unit="target byte",
        visibilities=(Visibility.encoder_decoder, Visibility.causal),
        reads_pairs=True,
    )
)
