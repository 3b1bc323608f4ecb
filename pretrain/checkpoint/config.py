"""Section `checkpoint` of a recipe."""

import math

from pydantic import BaseModel, Field

from byteloom.core.storage.locations import LocationText


class CheckpointConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Interval and retention of checkpoints. One is always written when a run ends or is interrupted."""

    every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep: int | None = Field(default=3, ge=1)
    """Number of newest valid checkpoints that are kept. Older ones are deleted after a new one is on disk, except the
    last good one and one that may become good (`health.window`). Null keeps all."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep checkpoints of steps that are multiples of this. `byteloom branch` continues from them: set it if the
    schedule is wsd or constant."""
    asynchronous: bool = True
    """Write checkpoints during training. This needs a copy of a rank's masters and moments in host memory."""
    home: LocationText | None = None
    """Folder or URL, such as s3://bucket/folder, for the checkpoints of all runs. Each run has a folder of its name in
    it. A new run folder finds them there. Null is the run folder."""

    def oldest_kept(self, steps: int) -> int:
        """Return the step of the oldest checkpoint that is left when a run of so many steps has finished."""
        saved = [*range(self.every, steps, self.every)[-self.keep if self.keep else 0 :], steps]
        oldest = saved[-self.keep if self.keep else 0 :][0]
        for_ever = steps if self.keep_every is None else math.lcm(self.every, self.keep_every)
        return min(oldest, for_ever)
