"""Objectives: what a model reads of a row, what it predicts, and what counts in the loss.

    Loader: row, its sequence number ─▶ Objective ─▶ Example: ids, targets, given ─▶ ByteModel

An example is a pure function of the row, the seed of the run and the row's sequence number. Resume, replay and
`inspect --step --row` therefore hold for every objective, on any number of ranks. A later epoch has other sequence
numbers, so it hides other bytes.

registry.py   objectives by name
config.py     section `objective` of a recipe
examples.py   rows of a micro-batch as the objective shows them
draws.py      random numbers of one row

Importing this package registers Byteloom's own objectives, one file each.
"""

from pretrain.objectives import causal, classification, conditional, masked, prefix, span_corruption  # noqa: F401 they register here
from pretrain.objectives.config import ObjectiveConfig
from pretrain.objectives.draws import Draws
from pretrain.objectives.examples import show_entropies, show_rows, stacked
from pretrain.objectives.registry import OBJECTIVES, Form, ObjectiveEntry, Shown, Visibility, register_objective

__all__ = [
    "OBJECTIVES",
    "Draws",
    "Form",
    "ObjectiveConfig",
    "ObjectiveEntry",
    "Shown",
    "Visibility",
    "register_objective",
    "show_entropies",
    "show_rows",
    "stacked",
]
