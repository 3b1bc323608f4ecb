"""Base class of the errors that a user can correct."""

from byteloom.core.faults import FaultClass


class CorrectableError(Exception):
    """An error whose message tells a user what to change. Commands print it as one line, without a traceback."""

    fault: FaultClass | None = None
    """Class of the failure, if it is known; see `class_of`."""
