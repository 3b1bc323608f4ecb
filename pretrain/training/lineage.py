"""Lineage of weights: the checkpoints and exports that a run began with, each with the digest that it had then.

Every checkpoint of a run and every card of an export hold it, oldest first:

    base ── step 400 ─▶ base.export ─▶ tuned ── step 90        lineage of tuned: [base at 400, base.export]

`ancestry` names runs whose steps a branch continues. The lineage also has runs that began anew, by initialize.weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pretrain.checkpoint import Metadata

LINEAGE = "lineage"
"""Field of a checkpoint's state, and of the card of an export."""


class Weights(BaseModel, frozen=True, use_attribute_docstrings=True):
    """Weights that others began with, or were exported from."""

    place: str
    """Absolute path, or URL, of the checkpoint or the export."""
    digest: str
    """Digest of the checkpoint's metadata.json (blake3) or of the export's card.json (sha256), which hold the digests
    of the values."""
    run: str | None = None
    """Id of the run; None for an export."""
    name: str | None = None
    """Name of the run; None for weights that were imported."""
    step: int | None = None
    """Step of the checkpoint; None for an export."""
    objective: str = "causal"
    """Objective of the training."""


def lineage_in(stored: Mapping[str, Any]) -> list[Weights]:
    """Return the weights that a checkpoint or an export descends from, oldest first, given its state or its card."""
    return [Weights.model_validate(each) for each in stored.get(LINEAGE, ())]


def lineage_to(checkpoint: Metadata) -> list[Weights]:
    """Return the weights that a checkpoint or an export descends from, oldest first, and itself."""
    state, config = checkpoint.state, checkpoint.state["config"]
    own = Weights(
        place=place_of(checkpoint),
        digest=checkpoint.digest,
        run=state.get("run"),
        name=config.get("run", {}).get("name"),
        step=state["reading"]["step"] if "reading" in state else None,
        objective=config.get("objective", {}).get("name", "causal"),
    )
    return [*lineage_in(state), own]


def place_of(checkpoint: Metadata) -> str:
    """Return the absolute path, or the URL, of a checkpoint or an export."""
    folder = checkpoint.folder
    return str(folder.resolve() if isinstance(folder, Path) else folder)


def stored_lineage(checkpoint: Metadata) -> list[dict[str, Any]]:
    """Return `lineage_to` as JSON values."""
    return [each.model_dump(mode="json") for each in lineage_to(checkpoint)]
