"""Classes of the failures of a start, which decide who is blamed, what counts against a limit, and when to start again.

scheduler   srun fails before a rank runs; a step is cancelled       nobody's node; a short pause
storage     a full disk, EIO, ESTALE, a bucket that does not answer  nobody's node; a long pause
data        a damaged corpus, a missing shard, a corpus that changed  nobody's node; a long pause; ends the run in time
node        lost; a killed rank; a rank that does not answer         the node; again at once, or on other nodes
code        any other error, and what strikes several nodes          nobody's node; counts as an attempt
"""

import os
import re
from typing import Literal

from byteloom.core.faults import DATA_EXIT_CODE, DISK_ERRNOS, STORAGE_EXIT_CODE

Fault = Literal["scheduler", "storage", "data", "node", "code"]

PAUSED: tuple[Fault, ...] = ("scheduler", "storage", "data")
"""Classes after which the ranks start again after a pause, and which use up no attempt."""
DEADLINES: dict[Fault, float] = {"scheduler": 1800.0, "data": 600.0}
"""Time in seconds of failures of a class in a row after which the run is given up. Storage has no such time."""

STORAGE_EXIT_CODES = (STORAGE_EXIT_CODE, 120)
"""Exit codes of a rank that its storage failed. Python ends with 120 when it cannot write its last output."""
STORAGE_WORDS = re.compile(
    "|".join(
        (
            *(re.escape(os.strerror(number)) for number in sorted(DISK_ERRNOS)),
            *(
                "EndpointConnectionError",
                "Could not connect to the endpoint",
                "ConnectTimeoutError",
                "ReadTimeoutError",
            ),
            *("ConnectionClosedError", "ClientConnectorError", "ServerDisconnectedError", "ServiceUnavailable"),
        )
    )
)
"""Words of a rank's last error that name its storage. Errors of other ranks reach a rank as text."""


def fault_of_exit(code: int, error: str) -> Fault:
    """Return the class of a rank's failure by its own account.

    Args:
        code: exit code of the rank.
        error: last error in its output.
    """
    if code in STORAGE_EXIT_CODES or STORAGE_WORDS.search(error):
        return "storage"
    return "data" if code == DATA_EXIT_CODE else "code"
