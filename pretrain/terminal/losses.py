"""Names of losses among metrics. Each objective has its own: bits_per_byte, bits_per_masked_byte and so on."""

import re
from collections.abc import Iterable

BITS_PER_BYTE = "bits_per_byte"
"""Name of the loss of the causal objective."""
LOSS = re.compile(r"(?:(.+)/)?(bits_per_[^/]+)")
"""Pattern of a loss: its place, such as train or validation/books, and its name."""


def is_loss(metric: str) -> bool:
    """Return whether a metric is a loss of any objective."""
    return LOSS.fullmatch(metric) is not None


def loss_at(place: str, metrics: Iterable[str]) -> str | None:
    """Return the metric that is the loss at a place, such as train/bits_per_byte at train; None if there is none."""
    return next((metric for metric in metrics if (found := LOSS.fullmatch(metric)) and found[1] == place), None)


def unit_of(metric: str) -> str:
    """Return the unit of a loss for people, such as bits/masked byte."""
    return metric.rpartition("/")[2].replace("_", " ").replace("bits per ", "bits/")
