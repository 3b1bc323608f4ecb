"""Section `health` of a recipe."""

from typing import Literal

from pydantic import BaseModel, Field


class HealthConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Response of a run to a bad batch, before its update."""

    non_finite: Literal["skip", "rewind", "stop"] = "skip"
    """Action if the loss or the gradient is not finite. skip: the update is not done, and no step reads the batch
    again. rewind: the run resumes from its last good checkpoint, and skips the bad batches. stop: the run ends, and
    keeps its weights for a post-mortem."""
    spike: Literal["ignore", "skip", "rewind", "stop"] = "skip"
    """Action if the loss or the gradient's norm is far above its window."""
    window: int = Field(default=100, ge=2)
    """Steps of the window. Its second half must be full before spikes are looked for. A checkpoint is good once the run
    was healthy for so many steps after it."""
    loss_deviations: float = Field(default=10.0, gt=0)
    """Distance of the loss from the window's median that is a spike, in deviations. A deviation is 1.4826 times the
    median absolute deviation, and at least 5 % of the median."""
    norm_deviations: float = Field(default=20.0, gt=0)
    """The same for the gradient's norm. A deviation is at least 25 % of the median."""
    patience: int = Field(default=3, ge=1)
    """Bad batches in a row after which a run rewinds instead of skipping one more."""
    skips: int = Field(default=10, ge=0)
    """Largest number of batches that are skipped within ten windows; then the run stops."""
    rewinds: int = Field(default=2, ge=0)
    """Largest number of rewinds of a run; then it stops."""
    rate_factor: float = Field(default=0.5, gt=0, le=1)
    """Factor of the learning rate after a rewind. It applies to rewinds because of bad batches; 1 changes no rate."""
    rate_steps: int = Field(default=100, ge=0)
    """Steps with the lower rate after the step at which the run had its bad batches."""
