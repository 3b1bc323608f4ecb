"""Times, as Slurm writes them."""

import math


def seconds_of(text: str) -> float:
    """Return the seconds of a time: 90 (minutes), 12:30 (minutes and seconds), 12:00:00, 2-00 or 2-00:00:00.

    Infinity for any other word, such as UNLIMITED.
    """
    days, dash, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        whole_days = int(days or 0)
    except ValueError:
        return math.inf
    if dash:  # hours come first
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((whole_days * 24 + hours) * 60 + minutes) * 60 + seconds
