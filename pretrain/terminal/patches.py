"""Metrics of patches for people: means of the last steps by stage, and a warning about rows without new patches."""

from collections.abc import Mapping, Sequence

OVERFLOW_SHARE = 0.03
"""Share of scored bytes after the last patch of a full row from which there is a warning."""


def stages_of(steps: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the mean metrics of patches over steps, by stage and name; {} if the steps have none.

    Args:
        steps: metrics of steps, by their names in metrics.jsonl.
    """
    stages: dict[str, dict[str, float]] = {}
    for metric in steps[-1] if steps else ():
        group, _, rest = metric.partition("/")
        stage, _, name = rest.partition("/")
        if group == "patches" and name:
            found = [step[metric] for step in steps if metric in step]
            stages.setdefault(stage, {})[name] = sum(found) / len(found)
    return stages


def overflow_remarks(stages: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a warning for each stage whose rows have many more patches than they may have."""
    return [
        f"patches of stage {stage}: {own['overflow_bytes']:.1%} of the scored bytes come after the last patch that "
        f"their row may have, in {own['overflow_rows']:.1%} of the rows; raise the capacity, or make larger patches"
        for stage, own in stages.items()
        if own.get("overflow_bytes", 0.0) >= OVERFLOW_SHARE
    ]
