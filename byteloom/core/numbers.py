"""Types of numbers that config fields share."""

from typing import Annotated

from pydantic import Field

Seconds = Annotated[float, Field(gt=0, le=1e9)]
"""A time limit. Timers of the system take no more than about 1e9 seconds, which is thirty years."""
