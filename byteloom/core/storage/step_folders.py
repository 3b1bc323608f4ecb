"""Names of a run's checkpoints: HOME/step-00001200, and of the files that say what such a folder is.

A folder of this name on a file system is a committed checkpoint. At a URL, it is one if it holds the marker. A folder
that is being written, deleted or was found invalid has a suffix: step-00001200.TAG.partial, .deleting, .invalid. So has
one that no run resumes from, because its values are not finite or the run diverged after it: .post-mortem.
"""

import re
from collections.abc import Iterable

from byteloom.core.storage.locations import Location

MARKER = "metadata.json"
"""File of a checkpoint that is written last and deleted first."""
REASON = "invalid.txt"
"""File of an invalid checkpoint that says why it is invalid."""
PARTIAL, DELETING, INVALID = ".partial", ".deleting", ".invalid"
"""Suffixes of folders that are no checkpoint: one being written, one being deleted, one found invalid."""
POST_MORTEM = ".post-mortem"
"""Suffix of a checkpoint that is kept for examination only."""


def step_name(step: int) -> str:
    """Return the name of the checkpoint of a step, with at least eight digits."""
    return f"step-{step:08d}"


def is_step_name(name: str) -> bool:
    """Return whether a name is that of a checkpoint."""
    return re.fullmatch(r"step-\d{8,}", name) is not None


def is_checkpoint_name(name: str) -> bool:
    """Return whether a name is that of a checkpoint or of a post-mortem."""
    return is_step_name(name.removesuffix(POST_MORTEM))


def step_of(checkpoint: Location) -> int:
    """Return the step of a checkpoint, by its name."""
    return step_in(checkpoint.name)


def step_in(name: str) -> int:
    """Return the step that the name of a checkpoint or of a post-mortem holds."""
    return int(name.removeprefix("step-").removesuffix(POST_MORTEM))


def step_names(names: Iterable[str]) -> list[str]:
    """Return the names of checkpoints among some names, sorted by step."""
    return sorted(filter(is_step_name, names), key=step_in)
