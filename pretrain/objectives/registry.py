"""Registry of objectives.

An objective is one file, which registers itself:

    register_objective(ObjectiveEntry(name="masked", show=show, unit="masked byte", visibilities=(...), ...))

Byteloom's own objectives are registered by pretrain/objectives. Those of other packages are found by the entry point
group `byteloom.objectives`; the name of an entry point is the name of its objective.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from byteloom.core.registries.registry import Registry
from data_pipeline.stream.rows import Ids
from data_pipeline.vocabulary import VOCABULARY
from pretrain.objectives.draws import Draws

if TYPE_CHECKING:
    from pretrain.objectives.config import ObjectiveConfig


class Visibility(StrEnum):
    """Ids that the score of an id may depend on, and so the arguments of a model's forward pass."""

    causal = "causal"
    """The ids before it: forward(ids)."""
    prefix = "prefix"
    """The ids before it. The ids of a prefix see each other: forward(ids, lengths of the prefixes)."""
    bidirectional = "bidirectional"
    """All ids of another row of the same length, such as the same row with masks: forward(ids, that row)."""
    encoder_decoder = "encoder_decoder"
    """All ids of a source, and the ids before it: forward(ids, sources)."""


class Form(NamedTuple):
    """Form of the examples that a model reads."""

    visibility: Visibility
    length: int
    """Ids that are predicted."""
    source_length: int
    """Ids of a source. Visibility other than encoder_decoder has none, and 0 here."""


class Shown(NamedTuple):
    """One row as an objective shows it. Ids and given ids that are shorter than the form are padded at the end."""

    ids: Ids
    """(n,) ids that are predicted, n <= Form.length."""
    targets: NDArray[np.bool_]
    """(n,) whether an id counts in the loss."""
    given: Ids | int | None = None
    """Second argument of the forward pass: (m,) ids, the length of the prefix, or None if visibility is causal."""


class Show(Protocol):
    """Function that shows one row."""

    def __call__(self, row: Ids, draws: Draws, form: Form, config: "ObjectiveConfig") -> Shown:
        """Return the row as the model reads it.

        Args:
            row: (T,) bytes, separators and padding.
            draws: random numbers of the row.
            form: of the examples.
            config: of the objective.

        Raises:
            ObjectiveError: the row is none that the objective can show.
        """


def _needs_none(_: "ObjectiveConfig", __: int) -> int:
    return 0


@dataclass(frozen=True)
class ObjectiveEntry:
    """An objective, as its file declares it. Whatever it does not declare is refused."""

    name: str
    """Value of `objective.name` in a recipe; unique."""
    show: Show | None
    """Shows a row. None: rows are examples as they are, which only causal does."""
    unit: str
    """Divisor of its loss, such as "masked byte". It names all numbers of the objective."""
    visibilities: tuple[Visibility, ...]
    """Visibilities that it can show rows for, the best first."""
    fields: frozenset[str] = frozenset()
    """Fields of ObjectiveConfig that it uses."""
    special_ids: Callable[["ObjectiveConfig", int], int] = _needs_none
    """Returns how many ids after the vocabulary it uses, such as masks, for rows of so many ids."""
    lengths: Callable[["ObjectiveConfig", int], tuple[int, int]] | None = None
    """Returns how many ids it predicts, and how many a source has, for rows of so many ids. None: a model of any
    lengths fits."""
    reads_pairs: bool = False
    """Whether each row must be a pair of a source and a target."""
    has_accuracy: bool = False
    """Whether `byteloom eval` shows the share of targets that are the likeliest bytes, of a bidirectional model."""
    options: type[BaseModel] | None = None
    """Config node of `objective.options`; None if it has no options of its own."""

    @property
    def metric(self) -> str:
        """Return the name of its loss among metrics: bits_per_byte, bits_per_masked_byte and so on."""
        return f"bits_per_{self.unit.replace(' ', '_')}"


FIRST_SPECIAL_ID = VOCABULARY
"""First of the ids that objectives use beyond bytes, separator and padding."""

OBJECTIVES: Registry[ObjectiveEntry] = Registry("objective", "byteloom.objectives")


def register_objective(entry: ObjectiveEntry) -> ObjectiveEntry:
    """Add an objective, and return it.

    Raises:
        RegistryError: the name is taken.
    """
    OBJECTIVES.register(entry.name, entry)
    return entry
