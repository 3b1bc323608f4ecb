"""Context of the first byte of a document in evaluation and generation.

In rows of concatenated documents, a first byte follows the separator of the previous document. In rows of one document
each, and in those without separators, nothing or another document precedes it.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Beginning(StrEnum):
    """Context of the first byte of a document."""

    auto = "auto"
    """The beginning in training: a separator if documents follow one in the rows of any source, else the start."""
    separator = "separator"
    """A separator, which is not scored."""
    start = "start"
    """Nothing: the model's own beginning of a row."""

    def resolved(self, data: Mapping[str, Any]) -> "Beginning":
        """Return the beginning that is meant.

        Args:
            data: section `data` of the recipe that the model was trained with.
        """
        if self is not Beginning.auto:
            return self
        sources = (data.get("mixture") or {}).values() or [data]
        follows = any(
            source.get("separate_documents", True) and source.get("packing", "concatenate") == "concatenate"
            for source in sources
        )
        return Beginning.separator if follows else Beginning.start
