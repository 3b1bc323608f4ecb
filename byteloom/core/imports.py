"""Imports of what takes seconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def for_good() -> Iterator[None]:
    """What is imported within stays: no garbage is looked for meanwhile, nor in it later, at the end included.

    A quarter of the time that a command with torch takes to begin and end.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
