"""Ancestry of a run: the checkpoints of other runs that it continues. `byteloom branch` makes it.

run.json and every checkpoint of a branch hold it, oldest ancestor first:

    stable ── step 40 ── decay ── step 60 ── longer        ancestry of longer: [stable at 40, decay at 60]
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from pretrain.tracking.mlflow.shipper import PARENT_RUN_TAG

ANCESTRY = "ancestry"
"""Field of run.json and of a checkpoint's state."""


class Ancestor(BaseModel, frozen=True, use_attribute_docstrings=True):
    """A run up to the step at which another run continues it."""

    run: str
    """Id of the run."""
    name: str
    """Name of the run."""
    step: int
    """Last step that was trained as this run."""
    checkpoint: str
    """Path or URL of its checkpoint of that step."""
    changes: tuple[str, ...] = ()
    """Differences of the recipe that continues it, a line each."""


def ancestors_in(stored: Mapping[str, Any]) -> list[Ancestor]:
    """Return the ancestors that run.json or the state of a checkpoint names, oldest first."""
    return [Ancestor.model_validate(each) for each in stored.get(ANCESTRY, ())]


def ancestor_at(ancestors: Sequence[Ancestor], step: int) -> Ancestor | None:
    """Return the ancestor that trained a step; None if the run itself did."""
    return next((each for each in ancestors if step <= each.step), None)


def describe_ancestry(ancestors: Sequence[Ancestor]) -> str:
    """Return the ancestry in words, newest first; nothing for a run that began by itself."""
    return ", a ".join(f"branch of {each.name} at step {each.step}" for each in reversed(ancestors))


def ancestry_tags(ancestors: Sequence[Ancestor]) -> dict[str, str]:
    """Return the tags of a branch for trackers."""
    if not ancestors:
        return {}
    parent = ancestors[-1]
    changed = {"branch.changes": "; ".join(parent.changes)} if parent.changes else {}
    return {PARENT_RUN_TAG: parent.run, "branch.of": parent.name, "branch.step": str(parent.step), **changed}
